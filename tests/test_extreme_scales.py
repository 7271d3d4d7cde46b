"""Neighbors, metrics and losses where squares overflow or vanish, against the same rows near 1."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rkd_cli import mining
from rkd_cli.approximate import nearly_nearest
from rkd_cli.commands.search import find_duplicates
from rkd_cli.compress import apply_pca, fit_pca, leading, to_int8
from rkd_cli.geometry import in_range, normalized, unit_rows
from rkd_cli.losses import (
    PKT,
    ArcFace,
    AttentionTransfer,
    ContextualSimilarity,
    D3still,
    EmbeddingMatching,
    HardDarkRank,
    MultiSimilarity,
    NormalizedSoftmax,
    ProxyAnchor,
    QueueKL,
    RelaxedContrastive,
    RKDAngle,
    RKDDistance,
    SmoothAP,
)
from rkd_cli.metrics import agreement, asymmetric_recall_at_k, at_r, recall_at_k, rescored_recall_at_k
from rkd_cli.retrieval import finite_in_range, nearest

# powers of two, which change no digit of a normal number: 9e18, 1e-23, 1e30, 8e-31 and so on
SCALES = [
    (torch.float32, 2.0**63),
    (torch.float32, 2.0**100),
    (torch.float32, 2.0**125),
    (torch.float32, 2.0**-76),
    (torch.float32, 2.0**-100),
    (torch.float64, 2.0**600),
    (torch.float64, 2.0**1000),
    (torch.float64, 2.0**-600),
    (torch.float64, 2.0**-900),
]
at_every_scale = pytest.mark.parametrize(("dtype", "scale"), SCALES)


def rows(count: int = 60, size: int = 8) -> Tensor:
    """(N, D) float32 within 1, of classes of four."""
    centers = torch.randn(count // 4, size).repeat_interleave(4, dim=0)
    return 0.1 * (centers + 0.7 * torch.randn(count, size))


LABELS = torch.arange(60) // 4


def slow_nearest(queries: Tensor, gallery: Tensor, k: int) -> list[list[int]]:
    """``math.dist`` neither overflows nor vanishes."""
    all_rows = gallery.tolist()
    return [
        sorted(range(len(all_rows)), key=lambda i, q=query: math.dist(q, all_rows[i]))[:k]  # type: ignore[misc]
        for query in queries.tolist()
    ]


@at_every_scale
def test_neighbors_are_those_of_the_same_rows_near_one(dtype: torch.dtype, scale: float) -> None:
    x = rows().to(dtype)
    expected, found = nearest(x, x, 5, torch.arange(60)), nearest(x * scale, x * scale, 5, torch.arange(60))
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[0], expected[0] * scale)


def test_squares_of_which_some_overflow() -> None:
    """At lengths about 1e19 float32 products of some pairs are infinite, and of others are not."""
    for seed in range(20):
        torch.manual_seed(seed)
        x = torch.randn(100, 8) * 1e19 * torch.rand(100, 1)
        assert nearest(x, x, 3)[1].tolist() == slow_nearest(x, x, 3)


@pytest.mark.parametrize(("large", "small"), [(1.0, 1e-23), (1e19, 1.0), (1e38, 1e-30), (1e10, 1e-12)])
def test_rows_of_very_different_lengths(large: float, small: float) -> None:
    x = torch.randn(60, 8) * small
    x[:3] = torch.randn(3, 8) * large
    # to a long row all of the others are at one distance
    assert nearest(x[3:], x, 4)[1].tolist() == slow_nearest(x[3:], x, 4)
    x[4:] = rows()[4:] * small  # the class of the long rows has none that is near
    hits = [LABELS[near[1]] == LABELS[query] for query, near in enumerate(slow_nearest(x, x, 2)) if query >= 4]
    assert recall_at_k(x, LABELS)[1] == pytest.approx(sum(map(int, hits)) / 60)
    assert sum(hits) > 30


def test_rows_that_differ_by_less_than_float32_squares_can_hold() -> None:
    x = torch.cat([torch.ones(60, 1), rows() * 1e-23], dim=1)
    assert nearest(x, x, 4)[1].tolist() == slow_nearest(x, x, 4)
    assert recall_at_k(x, LABELS) == recall_at_k(x[:, 1:].double() * 1e23, LABELS)


@at_every_scale
def test_metrics_have_no_unit(dtype: torch.dtype, scale: float) -> None:
    x, y = rows().to(dtype), rows().to(dtype)
    codes = x[:, :3].clone()

    def measured(by: float) -> list[Any]:
        a, b = x * by, y * by
        return [
            recall_at_k(a, LABELS),
            asymmetric_recall_at_k(a, b, LABELS),
            rescored_recall_at_k(a, b, codes * by, codes * by, LABELS, shortlist=3),
            at_r(a, LABELS),
            agreement(a, y)["overlap@10"],  # each in a space of its own; asymmetric figures are of one
            agreement(y, a)["overlap@10"],
            agreement(a, b),
        ]

    expected = measured(1.0)
    assert measured(scale) == expected
    assert expected[0][1] > 0.5  # of 60 at random: 0.05


@at_every_scale
def test_duplicates_have_no_unit(dtype: torch.dtype, scale: float) -> None:
    x = rows().to(dtype)
    assert find_duplicates(x * scale, 0.9, print) == find_duplicates(x, 0.9, print)


@pytest.mark.parametrize("scale", [2.0**63, 2.0**-76, 2.0**-110])
def test_an_index_of_faiss_has_no_unit(scale: float) -> None:
    pytest.importorskip("faiss")
    x = rows(400)
    found, expected = nearly_nearest(x * scale, x * scale, 5), nearest(x, x, 5)
    assert found.recall > 0.99
    assert float((found.rows == expected[1]).double().mean()) > 0.98


@at_every_scale
def test_unit_length_has_no_unit(dtype: torch.dtype, scale: float) -> None:
    x = rows().to(dtype)
    mean, components = fit_pca(x.float(), 4)
    for unit in (unit_rows, normalized, lambda x: leading(x, 4, unit=True)):
        assert torch.equal(unit(x * scale), unit(x))
    if dtype == torch.float32 and scale < 2.0**120:
        torch.testing.assert_close(
            apply_pca(x * scale, mean * scale, components, unit=True), apply_pca(x, mean, components, unit=True)
        )


Pair = Callable[[Tensor, Tensor], Tensor]
MAPS = (15, 4, 2, 4)


def labelled(loss: nn.Module) -> Pair:
    return lambda student, teacher: loss(student, LABELS)


# of the student and the teacher: how long either is makes no difference
WITHOUT_UNIT: dict[str, Callable[[], Pair]] = {
    "distance": RKDDistance,
    "angle": RKDAngle,
    "relaxed": RelaxedContrastive,
    "pkt": PKT,
    "matching": EmbeddingMatching,
    "contextual": ContextualSimilarity,
    "queue": QueueKL,
    "d3still": D3still,
    "attention": lambda: lambda student, teacher: AttentionTransfer()(student.view(MAPS), teacher.view(MAPS)),
    "multi-similarity": lambda: labelled(MultiSimilarity()),
    "smooth-ap": lambda: labelled(SmoothAP()),
    "proxy-anchor": lambda: labelled(ProxyAnchor(15, 8)),
    "softmax": lambda: labelled(NormalizedSoftmax(15, 8)),
    "arcface": lambda: labelled(ArcFace(15, 8)),
}


@at_every_scale
@pytest.mark.parametrize("name", WITHOUT_UNIT)
def test_losses_without_a_unit_have_none(name: str, dtype: torch.dtype, scale: float) -> None:
    student, teacher = rows().to(dtype), rows().to(dtype)

    def taken(by: float, other: float) -> tuple[Tensor, Tensor]:
        torch.manual_seed(3)  # proxies
        x = (student * by).requires_grad_()
        value = WITHOUT_UNIT[name]()(x, teacher * other)
        (gradient,) = torch.autograd.grad(value, x)
        return value.detach(), gradient * by

    value, gradient = taken(1.0, 1.0)
    for by, other in ((scale, 1.0), (1.0, scale), (scale, scale)):
        found, pull = taken(by, other)
        torch.testing.assert_close(found, value, rtol=2e-5, atol=0)
        if math.isfinite(1 / by) and 1 / by < torch.finfo(dtype).max / 1e3 and 1 / by > torch.finfo(dtype).tiny * 1e6:
            torch.testing.assert_close(pull, gradient, rtol=1e-3, atol=1e-5 * gradient.abs().max().item())


@at_every_scale
def test_the_order_of_darkranks_teacher_has_no_unit(dtype: torch.dtype, scale: float) -> None:
    student, teacher = rows().to(dtype), rows().to(dtype)
    assert torch.equal(HardDarkRank()(student, teacher * scale), HardDarkRank()(student, teacher))


@at_every_scale
@pytest.mark.parametrize("miner", [mining.HardNegative(), mining.SemiHardNegative(), mining.DistanceWeighted()])
def test_miners_have_no_unit(miner: Any, dtype: torch.dtype, scale: float) -> None:
    x, found = rows().to(dtype), []
    for by in (1.0, scale):
        torch.manual_seed(3)
        found.append(miner(x * by, LABELS))
    for near, far in zip(*found, strict=True):
        assert torch.equal(near, far)


@pytest.mark.parametrize("scale", [2.0**-9, 1.0, 2.0**39])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_in_range_stay_as_they_are(dtype: torch.dtype, scale: float) -> None:
    x = F.normalize(torch.randn(9, 4, dtype=dtype), dim=1) * scale
    x[0] = torch.tensor([1.0, -0.0, 0.0, 1.0]) * scale
    assert torch.equal(in_range(x), x)
    assert finite_in_range(x)[1][0] is x
    assert torch.equal(normalized(x), F.normalize(x, dim=1))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dim", [None, 1])
def test_values_that_are_not_finite_stay(bad: float, dim: int | None) -> None:
    x = torch.tensor([[bad, 1e-30], [1.0, 1.0]])
    assert in_range(x, dim)[0, 0].isnan() == math.isnan(bad)
    assert not in_range(x, dim)[0, 0].isfinite()


def test_zeros_stay_zeros() -> None:
    x = torch.zeros(4, 3, requires_grad=True)
    assert torch.equal(in_range(x), x)
    assert torch.equal(normalized(x), x)
    assert finite_in_range(x)[0] == 1.0


def test_small_values_in_half_precision_have_bytes() -> None:
    """A scale of theirs is no number of float16."""
    x = (rows() * 1e-5).half()
    codes, scales = to_int8(x)
    assert int(codes.abs().max()) == 127
    assert bool(((codes * scales - x.float()).abs() <= scales).all())
