"""What holds of every loss with every miner: NaN stays NaN, and neither autocast nor TF32 changes a digit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

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
from rkd_cli.mining import AllPairs, DistanceWeighted, HardNegative, RandomNegative, SemiHardNegative

Loss = Callable[[Tensor, Tensor], Tensor]
LABELS = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 3])


def fitnet() -> FitNet:
    loss = FitNet(6, 6)
    torch.nn.init.normal_(loss.transform.weight)
    return loss


def projected() -> Loss:
    loss = EmbeddingMatching("squared", 4, 6)
    return lambda student, teacher: loss(student[:, [0, 1, 2, 5]], teacher)


def as_maps(loss: Loss) -> Loss:
    return lambda student, teacher: loss(student.view(-1, 2, 3, 1), teacher.view(-1, 2, 3, 1))


DISTILLATION: dict[str, Callable[[], Loss]] = {
    "distance": RKDDistance,
    "angle": RKDAngle,
    "dark": HardDarkRank,
    "relaxed": RelaxedContrastive,
    "pkt": PKT,
    "fitnet": fitnet,
    "attention": lambda: as_maps(AttentionTransfer()),
    "cosine": lambda: EmbeddingMatching("cosine", 6, 6),
    "squared": lambda: EmbeddingMatching("squared", 6, 6),
    "projected": projected,
    "contextual": lambda: ContextualSimilarity(0.1, 0.05, 3, 20, 6),
    "queue": lambda: QueueKL(0.07, 20, 6),
    "d3still": lambda: D3still(4, 200, 10, 2, 20, 6),
    "prefixes": lambda: Matryoshka(RKDDistance(), (2, 4), truncate_teacher=False, renormalize=True),
    "prefixes of both": lambda: Matryoshka(D3still(4, 200, 10, 2, 0, 6), (6,), truncate_teacher=True, renormalize=True),
}
MINERS = {
    "all": AllPairs(),
    "random": RandomNegative(),
    "hard": HardNegative(),
    "semihard": SemiHardNegative(),
    "weighted": DistanceWeighted(),
    "published": DistanceWeighted(published=True),
}
LABELLED: dict[str, Callable[[Any], Loss]] = {
    "l2_triplet": lambda miner: TripletLoss(2, 0.2, miner),
    "l1_triplet": lambda miner: TripletLoss(1, 0.2, miner),
    "contrastive": lambda miner: ContrastiveLoss(0.2, miner),
}
WITHOUT_MINER: dict[str, Callable[[], Loss]] = {
    "multi_similarity": lambda: MultiSimilarity(2, 50, 1, 0.1),
    "proxy_anchor": lambda: ProxyAnchor(4, 6, 32, 0.1),
    "normalized_softmax": lambda: NormalizedSoftmax(4, 6, 0.05),
    "arcface": lambda: ArcFace(4, 6, 64, 0.5),
    "smooth_ap": lambda: SmoothAP(0.01),
}


def loss_named(name: str) -> Loss:
    """A loss of (student, teacher); one of labels looks at the student alone."""
    torch.manual_seed(5)
    if name in DISTILLATION:
        return DISTILLATION[name]()
    if name in WITHOUT_MINER:
        loss = WITHOUT_MINER[name]()
    else:
        kind, miner = name.split()
        loss = LABELLED[kind](MINERS[miner])
    return lambda student, teacher: loss(student, LABELS.to(student.device))


LOSSES = [*DISTILLATION, *WITHOUT_MINER, *(f"{kind} {miner}" for kind in LABELLED for miner in MINERS)]


def value_and_gradient(name: str, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    student = student.detach().clone().requires_grad_()
    value = loss_named(name)(student, teacher)
    (gradient,) = torch.autograd.grad(value, student)
    return value.detach(), gradient


@pytest.mark.parametrize("name", DISTILLATION)
@pytest.mark.parametrize("whose", ["student", "teacher", "both"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("everywhere", [False, True])
def test_distillation_from_or_of_nan_costs_nan(name: str, whose: str, bad: float, everywhere: bool) -> None:
    student, teacher = torch.randn(9, 6), torch.randn(9, 6)
    where = (slice(None), slice(None)) if everywhere else (4, 1)
    for rows, mine in ((student, "student"), (teacher, "teacher")):
        if whose in (mine, "both"):
            rows[where] = bad
    value = loss_named(name)(student, teacher)
    assert value.isnan() or (math.isinf(bad) and value.isinf())


@pytest.mark.parametrize("name", LABELLED)
@pytest.mark.parametrize("miner", MINERS)
@pytest.mark.parametrize("row", [0, 4, 8])  # the last is in no pair, and no miner need draw it
def test_a_labelled_loss_of_nan_is_nan(name: str, miner: str, row: int) -> None:
    x = torch.randn(9, 6)
    x[row, 2] = math.nan
    if miner == "published":
        with pytest.raises(FloatingPointError, match="not finite"):
            loss_named(f"{name} {miner}")(x, x)
    else:
        assert loss_named(f"{name} {miner}")(x, x).isnan()


@pytest.mark.parametrize("name", WITHOUT_MINER)
@pytest.mark.parametrize("row", [0, 4, 8])  # the last is alone in its class
def test_a_loss_of_labels_without_miner_of_nan_is_nan(name: str, row: int) -> None:
    x = torch.randn(9, 6)
    x[row, 2] = math.nan
    assert loss_named(name)(x, x).isnan()


@pytest.mark.parametrize("name", LOSSES)
def test_autocast_changes_nothing(name: str) -> None:
    student, teacher = torch.randn(9, 6), torch.randn(9, 6)
    expected = value_and_gradient(name, student, teacher)
    with torch.autocast("cpu", torch.bfloat16):
        found = value_and_gradient(name, student, teacher)
    assert expected[0].dtype == found[0].dtype == torch.float32
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_embeddings_are_widened_first(name: str) -> None:
    student, teacher = torch.randn(9, 6).bfloat16(), torch.randn(9, 6).bfloat16()
    expected, pull = value_and_gradient(name, student.float(), teacher.float())
    value, gradient = value_and_gradient(name, student, teacher)
    torch.testing.assert_close(value.float(), expected, rtol=2**-8, atol=0)  # but for the last rounding
    torch.testing.assert_close(gradient.float(), pull, rtol=2**-6, atol=2**-8 * pull.abs().max().item())


@pytest.fixture
def tf32() -> Iterator[None]:
    backends: Any = torch.backends
    backends.fp32_precision = backends.cuda.matmul.fp32_precision = "tf32"
    yield
    assert (backends.fp32_precision, backends.cuda.matmul.fp32_precision) == ("tf32", "tf32")
    backends.fp32_precision = backends.cuda.matmul.fp32_precision = "none"


@pytest.mark.parametrize("name", LOSSES)
def test_tf32_changes_nothing_and_stays_on(name: str, request: pytest.FixtureRequest) -> None:
    student, teacher = torch.randn(9, 6), torch.randn(9, 6)
    expected = value_and_gradient(name, student, teacher)
    request.getfixturevalue("tf32")
    found = value_and_gradient(name, student, teacher)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def moved(loss: Loss, x: Tensor) -> Loss:
    """The loss, with what it holds of its own where ``x`` is, and in its type."""
    closed = [cell.cell_contents for cell in getattr(loss, "__closure__", None) or ()]
    for held in (loss, *closed):
        if isinstance(held, torch.nn.Module):
            held.to(x)
    return loss


@pytest.mark.cuda
@pytest.mark.parametrize("name", [n for n in LOSSES if n.split()[-1] not in ("random", "weighted", "published")])
def test_a_gpu_agrees_in_float64(name: str) -> None:
    """But for miners that draw: a GPU draws other numbers."""
    student, teacher, found = torch.randn(9, 6).double(), torch.randn(9, 6).double(), []
    for device in ("cpu", "cuda"):
        x = student.clone().to(device).requires_grad_()
        value = moved(loss_named(name), x)(x, teacher.to(device))
        found.append((value.detach().cpu(), torch.autograd.grad(value, x)[0].cpu()))
    for here, there in zip(*found, strict=True):
        torch.testing.assert_close(there, here, rtol=1e-9, atol=1e-11)
