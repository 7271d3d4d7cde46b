"""What one training step computes of a batch: metric learning for a teacher, distillation for a student."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rkd_cli.data.loader import Batch
from rkd_cli.models import EmbeddingNet
from rkd_cli.runtime.context import Context
from rkd_cli.training.objective import Objective, View


class TeacherStep:
    """Metric learning: a loss of embeddings and labels.

    Args:
        model: what learns.
        name: of the loss, in reports.
        loss: called as ``loss(embeddings, labels)``.
        context: of this process.
    """

    def __init__(self, model: EmbeddingNet, name: str, loss: nn.Module, context: Context) -> None:
        self.model, self.name, self.loss, self.context = model, name, loss, context

    def __call__(self, batch: Batch, epoch: int) -> dict[str, Tensor]:
        """{name: loss} of a batch, which is not on the device yet."""
        images, labels = self.context.to_device(batch.images), self.context.to_device(batch.labels)
        with self.context.autocast():
            embeddings = self.model(images)
        return {self.name: self.loss(embeddings.float(), labels)}


class DistillStep:
    """Distillation: an objective of what student and teacher make of the same images.

    Args:
        student: what learns.
        teacher: in evaluation mode; it gets no gradient.
        objectives: of the first ``hint_epochs`` epochs and of those after them, or one for all.
        hint_epochs: how long the first of two objectives holds.
        context: of this process.
    """

    def __init__(
        self,
        student: EmbeddingNet,
        teacher: EmbeddingNet,
        objectives: Sequence[Objective],
        hint_epochs: int,
        context: Context,
    ) -> None:
        self.student, self.teacher, self.context = student, teacher, context
        self.objectives, self.hint_epochs = objectives, hint_epochs

    def __call__(self, batch: Batch, epoch: int) -> dict[str, Tensor]:
        """{name: ratio * loss} of a batch, which is not on the device yet."""
        objective = self.objectives[0 if epoch <= self.hint_epochs else -1]
        images, labels = self.context.to_device(batch.images), self.context.to_device(batch.labels)
        student, teacher = views(self.student, self.teacher, images, objective.needs_stages, self.context)
        return objective(student, teacher, labels)


def views(
    student: EmbeddingNet, teacher: EmbeddingNet, images: Tensor, with_stages: bool, context: Context
) -> tuple[View, View]:
    """What student and teacher make of the same images; gradients flow to the student alone.

    Args:
        student, teacher: the networks; for stages both have them exposed.
        images: (N, 3, H, W) on the device.
        with_stages: whether feature maps are asked for.
        context: of this process.
    """
    with context.autocast():
        with torch.no_grad():
            target = _view(teacher, images, with_stages)
        learned = _view(student, images, with_stages)
    return learned, target


def _view(network: EmbeddingNet, images: Tensor, with_stages: bool) -> View:
    if not with_stages:
        return View(network(images).float(), [])
    embeddings, stages = network(images, with_features=True)
    return View(embeddings.float(), [stage.float() for stage in stages])


def update_weights(optimizer: torch.optim.Optimizer, losses: dict[str, Tensor]) -> None:
    """Adjust the weights by the gradient of the sum of the losses."""
    loss = torch.stack(list(losses.values())).sum()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
