"""What one training step computes of a batch: metric learning for a teacher, distillation for a student."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rkd_cli.data.loader import Batch
from rkd_cli.models import EmbeddingNet
from rkd_cli.runtime.context import Context
from rkd_cli.training.chunks import in_chunks
from rkd_cli.training.objective import Objective, View
from rkd_cli.training.teachers import Teacher, view_of


class TeacherStep:
    """Metric learning: a loss of embeddings and labels.

    Args:
        model: what learns, from the images of a batch or their features.
        name: of the loss, in reports.
        loss: called as ``loss(embeddings, labels)``.
        context: of this process.
        chunk: images that pass the network at once; 0 for all.
    """

    def __init__(self, model: nn.Module, name: str, loss: nn.Module, context: Context, chunk: int = 0) -> None:
        self.model, self.name, self.loss, self.context, self.chunk = model, name, loss, context, chunk

    def __call__(self, batch: Batch, epoch: int) -> dict[str, Tensor]:
        """{name: loss} of a batch, which is not on the device yet."""
        images, labels = self.context.to_device(batch.images), self.context.to_device(batch.labels)
        with self.context.autocast():
            (embeddings,) = in_chunks(self.model, self._embed, images, self.chunk)
        return {self.name: self.loss(embeddings.float(), labels)}

    def _embed(self, images: Tensor) -> list[Tensor]:
        return [self.model(images)]


class DistillStep:
    """Distillation: an objective of what student and teacher make of the same images.

    Args:
        student: what learns.
        teacher: what it learns from.
        objectives: of the first ``hint_epochs`` epochs and of those after them, or one for all.
        hint_epochs: how long the first of two objectives holds.
        context: of this process.
        chunk: images that pass the student at once; 0 for all.
    """

    def __init__(
        self,
        student: EmbeddingNet,
        teacher: Teacher,
        objectives: Sequence[Objective],
        hint_epochs: int,
        context: Context,
        chunk: int = 0,
    ) -> None:
        self.student, self.teacher, self.context = student, teacher, context
        self.objectives, self.hint_epochs, self.chunk = objectives, hint_epochs, chunk

    def __call__(self, batch: Batch, epoch: int) -> dict[str, Tensor]:
        """{name: ratio * loss} of a batch, which is not on the device yet."""
        objective = self.objectives[0 if epoch <= self.hint_epochs else -1]
        labels = self.context.to_device(batch.labels)
        with_stages = objective.needs_stages
        student, teacher = views(self.student, self.teacher, batch, with_stages, self.context, self.chunk)
        return objective(student, teacher, labels)


def views(
    student: EmbeddingNet, teacher: Teacher, batch: Batch, with_stages: bool, context: Context, chunk: int = 0
) -> tuple[View, View]:
    """What student and teacher make of the same images; gradients flow to the student alone.

    Args:
        student: the network; for stages it has them exposed.
        teacher: what it learns from.
        batch: (N, 3, H, W) images, which are not on the device yet.
        with_stages: whether feature maps are asked for.
        context: of this process.
        chunk: images that pass the student at once; 0 for all.
    """
    images = context.to_device(batch.images)
    target = teacher.view(images, batch, with_stages)
    with context.autocast():
        learned = view_of(student, images, with_stages, chunk)
    return learned, target


def update_weights(optimizer: torch.optim.Optimizer, losses: dict[str, Tensor]) -> None:
    """Adjust the weights by the gradient of the sum of the losses."""
    loss = torch.stack(list(losses.values())).sum()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
