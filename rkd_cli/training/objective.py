"""The terms of a distillation loss, from its settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pkgutil import resolve_name

import torch
from torch import Tensor, nn

from rkd_cli.errors import SettingsError
from rkd_cli.losses import AttentionTransfer, FitNet, HardDarkRank, TripletLoss
from rkd_cli.models import EmbeddingNet
from rkd_cli.settings import DistillSettings, relation_losses
from rkd_cli.training.miners import MINERS
from rkd_cli.training.step import Term, View

_BLOCKS = (1, 2, 3)  # of four, counted from 0: the paper transfers blocks 2, 3 and 4


def distill_stages(
    settings: DistillSettings, student: EmbeddingNet, teacher: EmbeddingNet, device: torch.device
) -> tuple[list[Term], list[Term]]:
    """The terms of the hint epochs, and those of the epochs after them. A term of ratio 0 is in neither.

    Raises:
        SettingsError: a term needs feature maps that one of the networks does not have.
    """
    triplet = TripletLoss(2, settings.triplet_margin, MINERS[settings.triplet_sample])
    terms = [
        *(
            Term(name.removesuffix("_ratio"), getattr(settings, name), _on_embeddings(resolve_name(loss)()))
            for name, loss in relation_losses(type(settings)).items()
        ),
        Term("dark", settings.dark_ratio, _on_embeddings(HardDarkRank(settings.dark_alpha, settings.dark_beta))),
        Term("triplet", settings.triplet_ratio, lambda student, teacher, labels: triplet(student.embeddings, labels)),
        Term("attention", settings.at_ratio, _on_maps([AttentionTransfer() for _ in _BLOCKS]), needs_maps=True),
    ]
    if settings.fitnet_ratio or settings.at_ratio:
        _need_maps(settings, student, teacher)
    if not settings.fitnet_ratio:
        return [], [term for term in terms if term.ratio]
    pairs = list(zip(student.map_channels(), teacher.map_channels(), strict=True))
    hints = [FitNet(*pairs[block]).to(device) for block in _BLOCKS]
    last = FitNet(student.embedding_size, teacher.embedding_size).to(device)
    on_maps, on_embeddings = _on_maps(hints), _on_embeddings(last)
    fitnet = Term("fitnet", settings.fitnet_ratio, lambda s, t, y: on_maps(s, t, y) + on_embeddings(s, t, y), True)
    after = [term for term in terms if term.ratio]
    return [fitnet], after if settings.hint_epochs else [fitnet, *after]


def _on_embeddings(loss: nn.Module) -> Callable[[View, View, Tensor], Tensor]:
    return lambda student, teacher, labels: loss(student.embeddings, teacher.embeddings)


def _on_maps(losses: Sequence[nn.Module]) -> Callable[[View, View, Tensor], Tensor]:
    def total(student: View, teacher: View, labels: Tensor) -> Tensor:
        pairs = ((student.maps[block], teacher.maps[block]) for block in _BLOCKS)
        return torch.stack([loss(*pair) for loss, pair in zip(losses, pairs, strict=True)]).sum()

    return total


def _need_maps(settings: DistillSettings, student: EmbeddingNet, teacher: EmbeddingNet) -> None:
    for who, network in (("student", student), ("teacher", teacher)):
        if not network.map_channels():
            flag = "--fitnet-ratio" if settings.fitnet_ratio else "--at-ratio"
            raise SettingsError(
                f"{flag}: the {who} has no feature maps of four blocks; the ResNets of torchvision have them "
                "(resnet18, resnet34, resnet50, resnet101, resnet152, resnext..., wide_resnet...)"
            )
