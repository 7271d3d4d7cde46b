"""Every loss, miner and metric refuses rows that do not match, and names the shapes: nothing is broadcast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rkd_cli import losses, mining
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
from rkd_cli.metrics import (
    agreement,
    asymmetric_recall_at_k,
    at_r,
    map_at_r,
    r_precision,
    recall_at_k,
    rescored_recall_at_k,
    without_positive,
)
from rkd_cli.retrieval import nearest

Called = Callable[[Tensor, Tensor], Any]

# called with (N, D) of both networks
PAIRS: dict[str, Callable[[], Called]] = {
    "distance": RKDDistance,
    "angle": RKDAngle,
    "dark": HardDarkRank,
    "relaxed": RelaxedContrastive,
    "pkt": PKT,
    "fitnet": lambda: FitNet(4, 4),
    "matching": EmbeddingMatching,
    "squared": lambda: EmbeddingMatching("squared"),
    "projected": lambda: EmbeddingMatching("cosine", 4, 6),
    "contextual": ContextualSimilarity,
    "queue": QueueKL,
    "d3still": D3still,
    "prefixes": lambda: Matryoshka(RKDDistance(), (2,)),
    "agreement": lambda: agreement,
    "asymmetric recall": lambda: lambda s, t: asymmetric_recall_at_k(s, t, torch.arange(8) // 2),
    "rescored recall": lambda: lambda s, t: rescored_recall_at_k(s, t, s, t, torch.arange(8) // 2),
}
SAME_SIZE = ("matching", "squared", "contextual", "queue", "d3still", "asymmetric recall", "rescored recall")
# called with (N, D) and (N,) labels
LABELLED: dict[str, Callable[[], Called]] = {
    "triplet": TripletLoss,
    "triplet of a miner of others": lambda: TripletLoss(miner=lambda x, y: (torch.tensor([0]),) * 3),
    "contrastive": ContrastiveLoss,
    "contrastive of a miner of others": lambda: ContrastiveLoss(miner=lambda x, y: (torch.tensor([0]),) * 3),
    "multi-similarity": MultiSimilarity,
    "proxy-anchor": lambda: ProxyAnchor(3, 4),
    "softmax": lambda: NormalizedSoftmax(3, 4),
    "arcface": lambda: ArcFace(3, 4),
    "smooth-ap": SmoothAP,
    "labelled prefixes": lambda: Matryoshka(MultiSimilarity(), (2,)),
    "all": mining.AllPairs,
    "random": mining.RandomNegative,
    "hard": mining.HardNegative,
    "semihard": mining.SemiHardNegative,
    "weighted": mining.DistanceWeighted,
    "published": lambda: mining.DistanceWeighted(published=True),
    "recall": lambda: recall_at_k,
    "r-precision": lambda: r_precision,
    "map@r": lambda: map_at_r,
    "at r": lambda: at_r,
}
X, Y = torch.arange(32.0).view(8, 4).sin(), torch.arange(8) // 3


def refused(called: Called, first: Tensor, second: Tensor) -> None:
    """With the shapes of both."""
    with pytest.raises(ValueError, match="need") as error:
        called(first, second)
    assert str(tuple(first.shape)) in str(error.value)
    assert str(tuple(second.shape)) in str(error.value)


def teacher_of(name: str, rows: int) -> Tensor:
    return torch.arange(rows * 6.0).view(rows, 6).cos()[:, : 6 if name == "projected" else 4]


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("rows", [5, 1, 0, 9])
def test_another_number_of_teacher_rows_is_refused(name: str, rows: int) -> None:
    """8 students and 5 teachers cost 393.9 by DarkRank; one teacher, broadcast, NaN by RKD's distances."""
    refused(PAIRS[name](), X, teacher_of(name, rows))


@pytest.mark.parametrize("name", PAIRS)
def test_one_student_of_many_teachers_is_refused(name: str) -> None:
    refused(PAIRS[name](), X[:1], teacher_of(name, 8))


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize(
    "change",
    [
        lambda x: x[0],
        lambda x: x[:, :, None],
        lambda x: x[:0],
        lambda x: x[:, :0],
        lambda x: x.long(),
        lambda x: x.to(torch.uint8),
        lambda x: x[0, 0],
    ],
    ids=["1-d", "3-d", "no rows", "no columns", "int64", "uint8", "0-d"],
)
@pytest.mark.parametrize("whose", ["student", "teacher", "both"])
def test_other_than_rows_of_floating_numbers_is_refused(
    name: str, change: Callable[[Tensor], Tensor], whose: str
) -> None:
    student, teacher = X, teacher_of(name, 8)
    refused(
        PAIRS[name](),
        change(student) if whose != "teacher" else student,
        change(teacher) if whose != "student" else teacher,
    )


@pytest.mark.parametrize("name", [*SAME_SIZE, "projected", "fitnet"])
def test_another_number_of_dimensions_is_refused_where_it_must_be_one(name: str) -> None:
    refused(PAIRS[name](), X[:, :3], teacher_of(name, 8))
    refused(PAIRS[name](), X, teacher_of(name, 8)[:, :3])


@pytest.mark.parametrize("name", [n for n in PAIRS if n not in (*SAME_SIZE, "projected", "fitnet")])
def test_relations_hold_between_sizes(name: str) -> None:
    PAIRS[name]()(X, teacher_of(name, 8)[:, :3])


@pytest.mark.parametrize("name", LABELLED)
@pytest.mark.parametrize(
    ("x", "y"),
    [
        (X, Y[:7]),
        (X, Y[:1]),
        (X, Y[:0]),
        (X[:7], Y),
        (X[0], Y),
        (X[0], Y[:4]),
        (X[:, :, None], Y),
        (X[:0], Y[:0]),
        (X[:, :0], Y),
        (X.long(), Y),
    ],
    ids=str,
)
def test_labels_of_other_rows_are_refused(name: str, x: Tensor, y: Tensor) -> None:
    refused(LABELLED[name](), x, y)


@pytest.mark.parametrize("name", [n for n in LABELLED if n != "labelled prefixes"])
def test_labels_that_are_no_row_are_refused(name: str) -> None:
    refused(LABELLED[name](), X, Y[:, None])


@pytest.mark.parametrize("name", ["proxy-anchor", "softmax", "arcface"])
def test_proxies_of_another_size_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"need embeddings and proxies with equal D, got \(8, 3\) and \(3, 4\)"):
        LABELLED[name]()(X[:, :3], Y)


@pytest.mark.parametrize("loss", [AttentionTransfer(), FitNet(2, 3)])
@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ((8, 2, 4, 4), (5, 3, 4, 4)),
        ((8, 2, 4, 4), (1, 3, 4, 4)),
        ((8, 2, 4, 4), (8, 3, 4, 1)),
        ((8, 2, 4, 4), (8, 3, 2, 8)),
        ((8, 2, 4, 4), (8, 3, 4)),
        ((8, 2, 4), (8, 3, 4)),
        ((8, 2, 4, 4), (8, 3)),
        ((0, 2, 4, 4), (0, 3, 4, 4)),
    ],
    ids=str,
)
def test_feature_maps_that_do_not_match_are_refused(
    loss: nn.Module, student: tuple[int, ...], teacher: tuple[int, ...]
) -> None:
    refused(loss, torch.ones(student), torch.ones(teacher))


def test_channels_that_are_not_the_convolutions_are_refused() -> None:
    refused(FitNet(2, 3), torch.ones(8, 3, 4, 4), torch.ones(8, 3, 4, 4))
    refused(FitNet(2, 3), torch.ones(8, 2), torch.ones(8, 1))


def test_every_loss_is_among_these() -> None:
    here = {type(made()).__name__ for made in (*PAIRS.values(), *LABELLED.values())} | {"AttentionTransfer"}
    assert here >= set(losses.__all__)


@pytest.mark.parametrize("labels", [torch.ones(3, 2).long(), torch.tensor(1)])
def test_labels_alone_are_a_row(labels: Tensor) -> None:
    with pytest.raises(ValueError, match="need"):
        without_positive(labels)


@pytest.mark.parametrize(("queries", "gallery"), [(X.long(), X), (X, X.long()), (X[0], X), (X, X[0]), (X[:, :3], X)])
def test_neighbors_are_of_rows_of_one_size(queries: Tensor, gallery: Tensor) -> None:
    refused(lambda q, g: nearest(q, g, 2), queries, gallery)
