"""Embed a data set and measure retrieval on it."""

from __future__ import annotations

import torch
from torch import Tensor

from rkd_cli.data.loader import EvalLoader
from rkd_cli.errors import RunError
from rkd_cli.events import Progress, Reporter
from rkd_cli.metrics import recall_at_k
from rkd_cli.models import EmbeddingNet
from rkd_cli.runtime.device import autocast


def embed(
    model: EmbeddingNet,
    batches: EvalLoader,
    device: torch.device,
    precision: str,
    report: Reporter,
    what: str,
) -> tuple[Tensor, Tensor]:
    """(N, D) float32 embeddings and (N,) labels of every image, on ``device``. Leaves the model in evaluation mode.

    Raises:
        DataError: damaged images.
        RunError: embeddings that are not finite.
    """
    model.eval()
    embeddings, labels, done = [], [], 0
    with torch.inference_mode(), autocast(device, precision):
        for images, batch_labels, _ in batches:
            embeddings.append(model(images.to(device, non_blocking=True)).float())
            labels.append(batch_labels)
            done += len(images)
            report(Progress(what, done, len(batches.images)))
    found = torch.cat(embeddings)
    if not bool(found.isfinite().all()):  # a sync; a comparison with NaN is false, so NaN would pass for a hit
        raise RunError(f"{what}: the network's embeddings are not finite: lower --lr; what was saved before is whole")
    return found, torch.cat(labels).to(device)


def evaluate(
    model: EmbeddingNet,
    batches: EvalLoader,
    ks: tuple[int, ...],
    device: torch.device,
    precision: str,
    report: Reporter,
    what: str,
) -> dict[int, float]:
    """{k: Recall@K} of a split, as fractions.

    Raises:
        DataError: damaged images.
    """
    return recall_at_k(*embed(model, batches, device, precision, report, what), ks)
