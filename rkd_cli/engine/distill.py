"""One step of distillation."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from rkd_cli.engine.teacher import LabelLoss
from rkd_cli.models import EmbeddingNet
from rkd_cli.runtime import autocast

RelationLoss = Callable[[Tensor, Tensor], Tensor]


def distill_terms(
    student: EmbeddingNet,
    teacher: EmbeddingNet,
    relation_losses: Mapping[str, tuple[float, RelationLoss]],
    label_losses: Mapping[str, tuple[float, LabelLoss]],
    device: torch.device,
    precision: str,
    images: Tensor,
    labels: Tensor,
) -> dict[str, Tensor]:
    """{name: ratio * loss} of one batch: the student is held to the teacher's relations, not to its outputs.

    Args:
        relation_losses: {name: (ratio, loss(student, teacher))}.
        label_losses: {name: (ratio, loss(embeddings, labels))}.
    """
    with autocast(device, precision):
        with torch.no_grad():
            taught = teacher(images)
        learned = student(images)
    taught, learned = taught.float(), learned.float()
    terms = {name: ratio * loss(learned, taught) for name, (ratio, loss) in relation_losses.items()}
    return terms | {name: ratio * loss(learned, labels) for name, (ratio, loss) in label_losses.items()}
