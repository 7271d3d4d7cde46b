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

_FEWER = "use a smaller --batch or --image-size"


def evaluation_batch(batch: int, chunk: int, device: torch.device) -> int:
    """Images that a run of ``--batch`` and ``--chunk`` embeds at once: without gradients a GPU has room for more."""
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
    remedy: str = _FEWER,
) -> Iterator[tuple[Batch, Tensor]]:
    """Each batch with the (B, D) embeddings of its images, on the device, of whatever type the precision gives.

    Args:
        compute: a network on the context's device in evaluation mode, or a part of one.
        batches: of images; of many ranks, each has its own.
        context: of this process.
        what: the name of this work.
        total: how many images there are, those of all ranks.
        report: is told how far it is, once the caller comes back for the next batch.
        done: images that were embedded before.
        is_checked: whether each batch is checked at once, at the cost of a sync.
        remedy: what to do where the memory is full.
    Raises:
        DataError: damaged images.
        RunError: embeddings that are not finite, or memory that is full.
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
    """Embed every image of the batches. Leaves the model in evaluation mode.

    Args:
        model: on the context's device.
        batches, total, context, report, what: as ``embed_batches``.
    Returns:
        (N, D) float32 embeddings and (N,) labels, on the context's device; the same on all ranks.
    Raises:
        DataError, RunError: as ``embed_batches``.
    """
    ranks = context.ranks
    found, labels, index, done = torch.empty(0, device=context.device), [], [], 0
    for batch, embeddings in embed_batches(model.eval(), batches, context, what, total, report, is_checked=False):
        if not done:  # in place from the first on: parts that are joined at the end would take twice the memory
            with naming_memory(what):
                found = found.new_empty(total, embeddings.shape[1])
        found[done : done + len(embeddings)] = embeddings
        labels.append(batch.labels)
        index.append(batch.index)
        done += len(batch.images)
    if ranks.size > 1:
        found, labels = _of_all(ranks, found[:done], index, labels, total)
    check_finite(found, what)
    return found, torch.cat(labels).to(context.device)


def _of_all(
    ranks: Ranks, found: Tensor, index: list[Tensor], labels: list[Tensor], total: int
) -> tuple[Tensor, list[Tensor]]:
    """(total, D) in the order of the images, and their labels, from those of each rank, which may have none."""
    ranks.wait()  # one may have had images that take longer
    size = ranks.largest(found.shape[1] if len(found) else 0)
    rows = ranks.gather(found.view(-1, size))
    none = torch.zeros(2, 0, dtype=torch.int64)
    facts = torch.cat([none, *(torch.stack(pair).cpu() for pair in zip(index, labels, strict=True))], dim=1)
    where, known = ranks.gather(facts.T).T
    assert torch.equal(where.sort().values, torch.arange(total)), "each image once, whoever has it"
    order = where.argsort()
    return rows[order.to(rows.device)], [known[order]]


def embed_batch(compute: Callable[[Tensor], Tensor], batch: Batch, context: Context) -> Tensor:
    """(B, D), of whatever type the precision gives, on the context's device; the model is in evaluation mode."""
    with torch.inference_mode(), context.autocast():
        return compute(context.to_device(batch.images))


def check_finite(embeddings: Tensor, what: str, why: str = ": lower --lr; what was saved before is whole") -> None:
    """That they are, at the cost of a sync; a comparison with NaN is false, so NaN would pass for a hit.

    Raises:
        RunError: they are not.
    """
    if not bool(embeddings.isfinite().all()):
        raise RunError(f"{what}: the network's embeddings are not finite{why}")
