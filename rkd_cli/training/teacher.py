"""One step of metric learning."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rkd_cli.models import EmbeddingNet
from rkd_cli.runtime.device import autocast

LabelLoss = Callable[[Tensor, Tensor], Tensor]


def teacher_terms(
    model: EmbeddingNet,
    name: str,
    criterion: LabelLoss,
    device: torch.device,
    precision: str,
    images: Tensor,
    labels: Tensor,
) -> dict[str, Tensor]:
    """{name: loss} of one batch."""
    with autocast(device, precision):
        embeddings = model(images)
    return {name: criterion(embeddings.float(), labels)}
