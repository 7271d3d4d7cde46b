"""What a student learns: every loss that a ratio turns on, built here and nowhere else."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from rkd_cli import mining
from rkd_cli.losses import (
    PKT,
    ArcFace,
    AttentionTransfer,
    ContrastiveLoss,
    FitNet,
    HardDarkRank,
    MultiSimilarity,
    NormalizedSoftmax,
    ProxyAnchor,
    RelaxedContrastive,
    RKDAngle,
    RKDDistance,
    SmoothAP,
    TripletLoss,
)
from rkd_cli.losses.pairs import Miner
from rkd_cli.settings import DistillSettings, TeacherSettings

STAGES = (1, 2, 3)  # of four, counted from 0: the paper transfers blocks 2, 3 and 4

MINERS: dict[str, Miner] = {
    "random": mining.RandomNegative(),
    "hard": mining.HardNegative(),
    "all": mining.AllPairs(),
    "semihard": mining.SemiHardNegative(),
    "distance": mining.DistanceWeighted(),
    "distance-published": mining.DistanceWeighted(published=True),
}


class View(NamedTuple):
    """What one network makes of a batch, in float32."""

    embeddings: Tensor  # (N, D)
    stages: list[Tensor]  # four maps (N, C, h, w), where a term asks for them


class Term(Protocol):
    """A loss of what student and teacher make of a batch with these labels."""

    def __call__(self, student: View, teacher: View, labels: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class Objective:
    """A sum of losses, each with its ratio."""

    terms: dict[str, tuple[float, Term]]

    def __call__(self, student: View, teacher: View, labels: Tensor) -> dict[str, Tensor]:
        """{name: ratio * loss} of one batch."""
        return {name: ratio * term(student, teacher, labels) for name, (ratio, term) in self.terms.items()}

    @property
    def needs_stages(self) -> bool:
        """Whether a term compares feature maps."""
        return any(isinstance(term, OnStages) for _, term in self.terms.values())

    @property
    def losses(self) -> nn.ModuleList:
        """What may hold weights and buffers of its own."""
        return nn.ModuleList(loss for _, term in self.terms.values() for loss in _modules(term))

    @property
    def ratios(self) -> dict[str, float]:
        """{name: ratio}."""
        return {name: ratio for name, (ratio, _) in self.terms.items()}


@dataclass(frozen=True)
class OnEmbeddings:
    """A loss that compares the embeddings of student and teacher."""

    loss: nn.Module

    def __call__(self, student: View, teacher: View, labels: Tensor) -> Tensor:
        """() loss."""
        found: Tensor = self.loss(student.embeddings, teacher.embeddings)
        return found


@dataclass(frozen=True)
class OnLabels:
    """A loss of the student's embeddings and the labels; no teacher."""

    loss: nn.Module

    def __call__(self, student: View, teacher: View, labels: Tensor) -> Tensor:
        """() loss."""
        found: Tensor = self.loss(student.embeddings, labels)
        return found


@dataclass(frozen=True)
class OnStages:
    """The sum of losses that compare feature maps, one a stage of ``STAGES``, and of one on the embeddings if given."""

    losses: list[nn.Module]
    embedding_loss: nn.Module | None = None

    def __call__(self, student: View, teacher: View, labels: Tensor) -> Tensor:
        """() loss."""
        pairs = [(student.stages[stage], teacher.stages[stage]) for stage in STAGES]
        total = torch.stack([loss(*pair) for loss, pair in zip(self.losses, pairs, strict=True)]).sum()
        return (
            total
            if self.embedding_loss is None
            else total + self.embedding_loss(student.embeddings, teacher.embeddings)
        )


def _modules(term: Term) -> Iterable[nn.Module]:
    match term:
        case OnEmbeddings(loss) | OnLabels(loss):
            return [loss]
        case OnStages(losses, last):
            return [*losses, *([last] if last else [])]
    return []


def teacher_loss(settings: TeacherSettings, classes: int) -> nn.Module:
    """The loss of ``rkd train-teacher``, called as ``loss(embeddings, labels)``; proxies are drawn from torch's
    generator."""
    miner, size = MINERS[settings.sample], settings.embedding_size
    match settings.loss:
        case "l2_triplet":
            return TripletLoss(2, settings.margin, miner)
        case "l1_triplet":
            return TripletLoss(1, settings.margin, miner)
        case "contrastive":
            return ContrastiveLoss(settings.margin, miner)
        case "multi_similarity":
            return MultiSimilarity(settings.ms_alpha, settings.ms_beta, settings.ms_base, settings.ms_epsilon)
        case "proxy_anchor":
            return ProxyAnchor(classes, size, settings.proxy_alpha, settings.proxy_margin)
        case "softmax":
            return NormalizedSoftmax(classes, size, settings.softmax_temperature)
        case "arcface":
            return ArcFace(classes, size, settings.arcface_scale, settings.arcface_margin)
        case "smooth_ap":
            return SmoothAP(settings.ap_temperature)


def distill_objective(settings: DistillSettings) -> Objective:
    """The terms of ``rkd distill`` but for FitNet's. A term of ratio 0 is left out."""
    triplet = TripletLoss(2, settings.triplet_margin, MINERS[settings.triplet_sample])
    terms: dict[str, tuple[float, Term]] = {
        "dist": (settings.dist_ratio, OnEmbeddings(RKDDistance())),
        "angle": (settings.angle_ratio, OnEmbeddings(RKDAngle())),
        "relaxed": (settings.relaxed_ratio, OnEmbeddings(RelaxedContrastive())),
        "pkt": (settings.pkt_ratio, OnEmbeddings(PKT())),
        "dark": (settings.dark_ratio, OnEmbeddings(HardDarkRank(settings.dark_alpha, settings.dark_beta))),
        "triplet": (settings.triplet_ratio, OnLabels(triplet)),
        "attention": (settings.at_ratio, OnStages([AttentionTransfer() for _ in STAGES])),
    }
    return Objective({name: (ratio, term) for name, (ratio, term) in terms.items() if ratio})


def fitnet_hints(settings: DistillSettings, student: View, teacher: View, device: torch.device) -> Objective:
    """FitNet on stages and embeddings, its 1x1 convolutions drawn from torch's generator.

    Args:
        settings: of the run.
        student, teacher: what the networks make of any batch: the convolutions take their channels from them.
        device: of the convolutions.
    """
    widths = [(student.stages[stage].shape[1], teacher.stages[stage].shape[1]) for stage in STAGES]
    hints: list[nn.Module] = [FitNet(*width).to(device) for width in widths]
    last = FitNet(student.embeddings.shape[1], teacher.embeddings.shape[1]).to(device)
    for hint in (*hints, last):
        hint.requires_grad_(False)  # the published code gives them to no optimizer
    return Objective({"fitnet": (settings.fitnet_ratio, OnStages(hints, last))})


def objectives(settings: DistillSettings, student: View, teacher: View, device: torch.device) -> list[Objective]:
    """What the epochs learn: one objective for all of them, or FitNet's hints for the first and another after them."""
    after = distill_objective(settings)
    if not settings.fitnet_ratio:
        return [after]
    hints = fitnet_hints(settings, student, teacher, device)
    return [hints, after] if settings.hint_epochs else [Objective(hints.terms | after.terms)]
