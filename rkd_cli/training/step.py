"""The losses of a training step: metric learning for a teacher, distillation for a student."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from rkd_cli.data.loader import Batch
from rkd_cli.models import EmbeddingNet
from rkd_cli.runtime.context import Context
from rkd_cli.runtime.distributed import Ranks
from rkd_cli.training.chunks import in_chunks
from rkd_cli.training.objective import Objective, View
from rkd_cli.training.teachers import Teacher, view_of


class TeacherStep:
    """A loss of embeddings and labels. ``chunk``: images processed at once, 0 for all."""

    def __init__(self, model: nn.Module, name: str, loss: nn.Module, context: Context, chunk: int = 0) -> None:
        self.model, self.name, self.loss, self.context, self.chunk = model, name, loss, context, chunk

    def __call__(self, batch: Batch, epoch: int) -> dict[str, Tensor]:
        """{name: loss} of a batch, from this rank's rows.

        Labels stay on the CPU: a loss whose shapes depend on them does not wait for the device.
        """
        images = self.context.to_device(batch.images)
        with self.context.own_draws(), self.context.autocast():
            (embeddings,) = in_chunks(self.model, self._embed, images, self.chunk)
        gather = self.context.ranks.gather
        return {self.name: self.loss(gather(embeddings.float()), gather(batch.labels))}

    def _embed(self, images: Tensor) -> list[Tensor]:
        return [self.model(images)]


class DistillStep:
    """An objective of student and teacher outputs for the same images. The first of two is for ``hint_epochs``."""

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
        """{name: ratio * loss} of a batch, from this rank's rows."""
        objective = self.objectives[0 if epoch <= self.hint_epochs else -1]
        with_stages = objective.needs_stages
        student, teacher = views(self.student, self.teacher, batch, with_stages, self.context, self.chunk)
        gather = self.context.ranks.gather
        learned, taught = (View(gather(view.embeddings), view.stages) for view in (student, teacher))
        return objective(learned, taught, gather(batch.labels))


def views(
    student: EmbeddingNet, teacher: Teacher, batch: Batch, with_stages: bool, context: Context, chunk: int = 0
) -> tuple[View, View]:
    """Student and teacher outputs for the same images. Gradients flow to the student only."""
    images = context.to_device(batch.images)
    target = teacher.view(images, batch, with_stages)
    with context.own_draws(), context.autocast():
        learned = view_of(student, images, with_stages, chunk)
    return learned, target


def update_weights(
    optimizer: torch.optim.Optimizer, losses: dict[str, Tensor], sum_up: Callable[[], None] = lambda: None
) -> None:
    """Backpropagate the sum of the losses and step the optimizer; ``sum_up`` sums gradients over ranks."""
    loss = torch.stack(list(losses.values())).sum()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    sum_up()
    optimizer.step()


def sum_gradients(ranks: Ranks, network: nn.Module, losses: nn.Module) -> None:
    """Sum gradients over ranks and average batch norm's running statistics: all ranks keep the same network.

    Each rank computes the loss L of all embeddings E and backpropagates into its own rows E_r. Then dL/dw is the sum
    over r of dL/dE_r dE_r/dw, not the mean that DistributedDataParallel takes. Every rank has the whole gradient of
    the losses' own weights, so only the main process counts. Nothing overlaps with the backward pass.
    """
    if ranks.size == 1:
        return
    of_losses = [weight.grad for weight in losses.parameters() if weight.grad is not None]
    if not ranks.is_first:
        for gradient in of_losses:
            gradient.zero_()
    statistics = _running_statistics(network)
    for statistic in statistics:
        statistic /= ranks.size
    gradients = [weight.grad for weight in network.parameters() if weight.grad is not None]
    ranks.sum_in_place([*gradients, *of_losses, *statistics])


def _running_statistics(network: nn.Module) -> list[Tensor]:
    """The running statistics that a step updates."""
    norms = [m for m in network.modules() if m.training and isinstance(getattr(m, "running_mean", None), Tensor)]
    learning = [norm for norm in norms if all(weight.requires_grad for weight in norm.parameters())]
    return [norm.get_buffer(name) for norm in learning for name in ("running_mean", "running_var")]
