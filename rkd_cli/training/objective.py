"""Build the losses that the settings turn on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from rkd_cli import mining
from rkd_cli.errors import SettingsError
from rkd_cli.losses import (
    PKT,
    ArcFace,
    AttentionTransfer,
    ContextualSimilarity,
    ContrastiveLoss,
    D3still,
    EmbeddingMatching,
    FitNet,
    HardDarkRank,
    Matryoshka,
    MultiSimilarity,
    NormalizedSoftmax,
    ProxyAnchor,
    QueueKL,
    RelaxedContrastive,
    RKDAngle,
    RKDDistance,
    SmoothAP,
    TripletLoss,
)
from rkd_cli.losses.pairs import Miner
from rkd_cli.models.embedding_net import TeacherSpace
from rkd_cli.runtime.distributed import ALONE, Ranks
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
    """The output of a network for a batch, in float32."""

    embeddings: Tensor  # (N, D), gathered from all ranks for losses
    stages: list[Tensor]  # four (N, C, h, w) feature maps of this rank's images, or none


class Term(Protocol):
    """A loss of student outputs, teacher outputs and labels."""

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
        """The losses as modules, which may have weights and buffers."""
        return nn.ModuleList(loss for _, term in self.terms.values() for loss in _modules(term))

    @property
    def ratios(self) -> dict[str, float]:
        """{name: ratio}."""
        return {name: ratio for name, (ratio, _) in self.terms.items()}


@dataclass(frozen=True)
class OnEmbeddings:
    """A loss that compares the embeddings of student and teacher, or its mean over several teachers side by side."""

    loss: nn.Module
    sizes: tuple[int, ...] = ()  # of several teachers

    def __call__(self, student: View, teacher: View, labels: Tensor) -> Tensor:
        """() loss."""
        if self.sizes:
            parts = torch.split(teacher.embeddings, list(self.sizes), dim=1)
            return torch.stack([self.loss(student.embeddings, part) for part in parts]).mean()
        found: Tensor = self.loss(student.embeddings, teacher.embeddings)
        return found


@dataclass(frozen=True)
class OnLabels:
    """A loss of the student's embeddings and the labels."""

    loss: nn.Module

    def __call__(self, student: View, teacher: View, labels: Tensor) -> Tensor:
        """() loss."""
        found: Tensor = self.loss(student.embeddings, labels)
        return found


@dataclass(frozen=True)
class OnStages:
    """The sum of a feature map loss for each stage of ``STAGES`` and an optional loss on the embeddings.

    Feature map losses are means over images, so ranks do not exchange feature maps.
    """

    losses: list[nn.Module]
    embedding_loss: nn.Module | None = None
    ranks: Ranks = ALONE

    def __call__(self, student: View, teacher: View, labels: Tensor) -> Tensor:
        """() loss."""
        pairs = [(student.stages[stage], teacher.stages[stage]) for stage in STAGES]
        total = torch.stack([loss(*pair) for loss, pair in zip(self.losses, pairs, strict=True)]).sum()
        total = self.ranks.mean(total, len(pairs[0][0]), len(student.embeddings))
        return (
            total
            if self.embedding_loss is None
            else total + self.embedding_loss(student.embeddings, teacher.embeddings)
        )


def _modules(term: Term) -> Iterable[nn.Module]:
    match term:
        case OnEmbeddings(loss) | OnLabels(loss):
            return [loss]
        case OnStages(losses, last, _):
            return [*losses, *([last] if last else [])]
    return []


def teacher_loss(settings: TeacherSettings, classes: int) -> nn.Module:
    """The loss of ``rkd train-teacher``, a function of (embeddings, labels). Draws proxies from torch's generator."""
    sizes = _sizes(settings, settings.embedding_size)
    return _on_prefixes([_teacher_loss(settings, classes, size) for size in sizes], settings, in_space=False)


def _teacher_loss(settings: TeacherSettings, classes: int, size: int) -> nn.Module:
    miner = MINERS[settings.sample]
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


def distill_objective(
    settings: DistillSettings, student_size: int, teacher_size: int, ranks: Ranks = ALONE, sizes: tuple[int, ...] = ()
) -> Objective:
    """The terms of ``rkd distill`` whose ratio is not 0, except FitNet's. ``sizes``: of teachers to average over."""
    by_size = [_embedding_losses(settings, size, teacher_size) for size in _sizes(settings, student_size)]
    terms: dict[str, tuple[float, Term]] = {}
    for name, (ratio, _) in by_size[-1].items():
        in_space = name in ("csd", "queue", "d3")
        if in_space and student_size != teacher_size:
            pca = ", or reduce the teacher's with `rkd embed --pca`" if student_size < teacher_size else ""
            raise SettingsError(
                f"--{name}-ratio: student embeddings have {student_size} dimensions, teacher embeddings "
                f"{teacher_size}. Pass --embedding-size {teacher_size}{pca}."
            )
        loss = _on_prefixes([losses[name][1] for losses in by_size], settings, in_space)
        terms[name] = ratio, OnLabels(loss) if name == "triplet" else OnEmbeddings(loss, sizes)
    if settings.at_ratio:
        terms["attention"] = settings.at_ratio, OnStages([AttentionTransfer() for _ in STAGES], ranks=ranks)
    return Objective(terms)


def _embedding_losses(settings: DistillSettings, size: int, teacher_size: int) -> dict[str, tuple[float, nn.Module]]:
    """{name: (ratio, loss)} for student embeddings of ``size``, without losses of ratio 0: some draw weights."""
    losses: dict[str, tuple[float, nn.Module]] = {}
    if settings.dist_ratio:
        losses["dist"] = settings.dist_ratio, RKDDistance()
    if settings.angle_ratio:
        losses["angle"] = settings.angle_ratio, RKDAngle()
    if settings.relaxed_ratio:
        losses["relaxed"] = settings.relaxed_ratio, RelaxedContrastive()
    if settings.pkt_ratio:
        losses["pkt"] = settings.pkt_ratio, PKT()
    if settings.dark_ratio:
        losses["dark"] = settings.dark_ratio, HardDarkRank(settings.dark_alpha, settings.dark_beta)
    if settings.match_ratio:
        losses["match"] = settings.match_ratio, EmbeddingMatching(settings.match_kind, size, teacher_size)
    queue = {} if settings.queue_size is None else {"queue_size": settings.queue_size}  # None: the loss's default
    if settings.csd_ratio:
        temperatures = settings.csd_temperature, settings.csd_teacher_temperature
        contextual = ContextualSimilarity(*temperatures, settings.csd_neighbors, size=size, **queue)
        losses["csd"] = settings.csd_ratio, contextual
    if settings.queue_ratio:
        losses["queue"] = settings.queue_ratio, QueueKL(settings.queue_temperature, size=size, **queue)
    if settings.d3_ratio:
        weights = settings.d3_feature, settings.d3_inconsistent, settings.d3_consistent
        losses["d3"] = settings.d3_ratio, D3still(settings.d3_neighbors, *weights, size=size, **queue)
    if settings.triplet_ratio:
        miner = MINERS[settings.triplet_sample]
        losses["triplet"] = settings.triplet_ratio, TripletLoss(2, settings.triplet_margin, miner)
    return losses


def _sizes(settings: TeacherSettings | DistillSettings, size: int) -> list[int]:
    """Sizes of embeddings that losses compare: Matryoshka prefixes and the whole."""
    return sorted({*settings.matryoshka, size})


def _on_prefixes(losses: list[nn.Module], settings: TeacherSettings | DistillSettings, in_space: bool) -> nn.Module:
    """Combine the losses for ``_sizes``; ``in_space``: compare with teacher prefixes of the same size."""
    if len(losses) == 1:
        return losses[0]
    return Matryoshka(nn.ModuleList(losses), settings.matryoshka, in_space, renormalize=settings.l2normalize)


def teacher_space(settings: DistillSettings, objective: Objective, teacher_size: int) -> TeacherSpace | None:
    """The student's projection into the teacher's space if a loss trains one, with the weights of that loss."""
    if not any((settings.match_ratio, settings.csd_ratio, settings.queue_ratio, settings.d3_ratio)):
        return None
    matching = [loss for loss in objective.losses.modules() if isinstance(loss, EmbeddingMatching)]
    weights = [loss.projection.weight for loss in matching if loss.projection is not None]
    return TeacherSpace(teacher_size, bool(settings.direction_flags), {weight.shape[1]: weight for weight in weights})


def fitnet_hints(
    settings: DistillSettings, student: View, teacher: View, device: torch.device, ranks: Ranks = ALONE
) -> Objective:
    """FitNet on stages and embeddings, for the channels of two example outputs.

    Its 1x1 convolutions are drawn from torch's generator.
    """
    widths = [(student.stages[stage].shape[1], teacher.stages[stage].shape[1]) for stage in STAGES]
    hints: list[nn.Module] = [FitNet(*width).to(device) for width in widths]
    last = FitNet(student.embeddings.shape[1], teacher.embeddings.shape[1]).to(device)
    for hint in (*hints, last):
        hint.requires_grad_(False)  # the published code does not train them
    return Objective({"fitnet": (settings.fitnet_ratio, OnStages(hints, last, ranks))})


def objectives(
    settings: DistillSettings,
    student: View,
    teacher: View,
    device: torch.device,
    ranks: Ranks = ALONE,
    sizes: tuple[int, ...] = (),
) -> list[Objective]:
    """One objective for all epochs, or FitNet's hints for the first epochs and another for the rest."""
    after = distill_objective(settings, student.embeddings.shape[1], teacher.embeddings.shape[1], ranks, sizes)
    if not settings.fitnet_ratio:
        return [after]
    hints = fitnet_hints(settings, student, teacher, device, ranks)
    return [hints, after] if settings.hint_epochs else [Objective(hints.terms | after.terms)]
