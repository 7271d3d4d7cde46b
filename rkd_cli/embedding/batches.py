"""Embed images with a network, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from rkd_cli.data.loader import Batch
from rkd_cli.errors import RunError
from rkd_cli.events import Progress, Reporter, silent
from rkd_cli.runtime.context import Context, naming_memory
from rkd_cli.runtime.distributed import Ranks

_REMEDY = "use a smaller --batch or --image-size"


def evaluation_batch(batch: int, chunk: int, device: torch.device) -> int:
    """The batch size of evaluation in a run with ``--batch`` and ``--chunk``; without gradients, a GPU fits more."""
    return (chunk or batch) * (4 if device.type == "cuda" else 1)


def embed_batches(
    compute: Callable[[Tensor], Tensor],
    batches: Iterable[Batch],
    context: Context,
    what: str,
    total: int = 0,
    report: Reporter = silent,
    done: int = 0,
    is_checked: bool = True,
    remedy: str = _REMEDY,
) -> Iterator[tuple[Batch, Tensor]]:
    """Yield each batch and the (B, D) embeddings of its images, on the device, in the dtype of the precision.

    Args:
        compute: a network in evaluation mode on the device, or a part of one.
        batches: of this rank.
        what: the name of the work, in progress and errors.
        total: images of all ranks.
        done: images that were embedded before.
        is_checked: check each batch for finite values, which synchronizes the device.
        remedy: for a full memory, in the error.
    Raises:
        DataError: damaged images.
        RunError: embeddings are not finite, or memory is full.
    """
    for batch in batches:
        with naming_memory(what, remedy):
            found = embed_batch(compute, batch, context)
        if is_checked:
            check_finite(found, what)
        yield batch, found
        done += len(found) * context.ranks.size
        report(Progress(what, min(total, done), total))


def embed(
    model: nn.Module, batches: Iterable[Batch], total: int, context: Context, report: Reporter, what: str
) -> tuple[Tensor, Tensor]:
    """``embed_batches`` of all ranks: (N, D) float32 embeddings and (N,) labels, on the device.

    Leaves the model in evaluation mode.
    """
    ranks = context.ranks
    found, labels, index, done = torch.empty(0, device=context.device), [], [], 0
    for batch, embeddings in embed_batches(model.eval(), batches, context, what, total, report, is_checked=False):
        if not done:  # allocate once: joining the batches at the end would take twice the memory
            with naming_memory(what):
                found = found.new_empty(total, embeddings.shape[1])
        found[done : done + len(embeddings)] = embeddings
        labels.append(batch.labels)
        index.append(batch.index)
        done += len(batch.images)
    if ranks.size > 1:
        found, labels = _gather(ranks, found[:done], index, labels, total)
    check_finite(found, what)
    return found, torch.cat(labels).to(context.device)


def _gather(
    ranks: Ranks, found: Tensor, index: list[Tensor], labels: list[Tensor], total: int
) -> tuple[Tensor, list[Tensor]]:
    """(total, D) embeddings in the order of the images, and their labels. A rank may have none."""
    ranks.wait()  # ranks may finish at very different times
    size = ranks.largest(found.shape[1] if len(found) else 0)
    rows = ranks.gather(found.view(-1, size))
    none = torch.zeros(2, 0, dtype=torch.int64)
    facts = torch.cat([none, *(torch.stack(pair).cpu() for pair in zip(index, labels, strict=True))], dim=1)
    where, known = ranks.gather(facts.T).T
    assert torch.equal(where.sort().values, torch.arange(total)), "each image exactly once"
    order = where.argsort()
    return rows[order.to(rows.device)], [known[order]]


def embed_batch(compute: Callable[[Tensor], Tensor], batch: Batch, context: Context) -> Tensor:
    """(B, D) embeddings on the device, in the dtype of the precision. The model is in evaluation mode."""
    with torch.inference_mode(), context.inference_autocast(compute):
        return compute(context.to_device(batch.images))


def check_finite(
    embeddings: Tensor, what: str, remedy: str = "Use another network, or train with a lower --lr."
) -> None:
    """Raise a RunError for NaN or infinite embeddings, which would count as hits. Synchronizes the device."""
    if not bool(embeddings.isfinite().all()):
        raise RunError(f"{what}: the network's embeddings are not finite. {remedy}")
