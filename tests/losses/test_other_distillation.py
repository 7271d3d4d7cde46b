"""DarkRank, attention transfer, FitNet, relaxed contrastive and PKT against loops, reference values, differences."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from rkd_cli.losses import PKT, AttentionTransfer, FitNet, HardDarkRank, RelaxedContrastive

DTYPES = [torch.float32, torch.float64]
Rows = list[list[float]]


def unit(row: list[float]) -> list[float]:
    length = math.hypot(*row)
    return [v / length for v in row]


def slow_dark_rank(student: Rows, teacher: Rows, alpha: float, beta: float, length: int) -> float:
    total = 0.0
    for i in range(len(student)):
        order = sorted((j for j in range(len(teacher)) if j != i), key=lambda j: math.dist(teacher[i], teacher[j]))
        scores = [-alpha * math.dist(student[i], student[j]) ** beta for j in order[:length]]
        for k, score in enumerate(scores):
            total -= score - math.log(sum(math.exp(s) for s in scores[k:]))
    return total / len(student)


def slow_relaxed(student: Rows, teacher: Rows, sigma: float, delta: float) -> float:
    n, total = len(student), 0.0
    teacher = [unit(row) for row in teacher]
    for i in range(n):
        mean = sum(math.dist(student[i], student[j]) for j in range(n)) / n
        for j in range(n):
            d = math.dist(student[i], student[j])
            if d > 0:
                w = math.exp(-(math.dist(teacher[i], teacher[j]) ** 2) / sigma)
                total += w * (d / mean) ** 2 + (1 - w) * max(0.0, delta - d / mean) ** 2
    return total / n


def slow_pkt(student: Rows, teacher: Rows) -> float:
    def probabilities(rows: Rows) -> Rows:
        rows = [unit(row) for row in rows]
        mapped = [[(1 + sum(a * b for a, b in zip(u, v, strict=True))) / 2 for v in rows] for u in rows]
        return [[p / sum(row) for p in row] for row in mapped]

    pairs = zip(itertools.chain(*probabilities(student)), itertools.chain(*probabilities(teacher)), strict=True)
    terms = [t * math.log((t + 1e-7) / (s + 1e-7)) for s, t in pairs]
    return sum(terms) / len(terms)


Slow = Callable[[Rows, Rows], float]
CASES: dict[str, tuple[torch.nn.Module, Slow]] = {
    "dark": (HardDarkRank(), lambda s, t: slow_dark_rank(s, t, 3, 3, 4)),
    "dark 1.5 2 6": (HardDarkRank(1.5, 2, 6), lambda s, t: slow_dark_rank(s, t, 1.5, 2, 6)),
    "relaxed": (RelaxedContrastive(), lambda s, t: slow_relaxed(s, t, 1, 1)),
    "relaxed 2 1.5": (RelaxedContrastive(2, 1.5), lambda s, t: slow_relaxed(s, t, 2, 1.5)),
    "pkt": (PKT(), slow_pkt),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [2, 3, 9])
def test_equals_the_loop(case: str, dtype: torch.dtype, n: int) -> None:
    loss, slow = CASES[case]
    student, teacher = torch.randn(n, 4, dtype=dtype), torch.randn(n, 6, dtype=dtype)
    value = loss(student, teacher)
    assert value.dtype == dtype
    assert value.item() == pytest.approx(slow(student.tolist(), teacher.tolist()), rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_gradient_equals_finite_differences(case: str) -> None:
    loss, _ = CASES[case]
    student = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(6, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: loss(x, teacher), student)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_identical_rows_stay_finite(case: str, n: int, dtype: torch.dtype, value: float) -> None:
    loss, _ = CASES[case]
    student = torch.full((n, 3), value, dtype=dtype, requires_grad=True)
    result = loss(student, torch.randn(n, 3, dtype=dtype))
    result.backward()
    assert torch.isfinite(result)
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()
    assert student.grad.abs().max() < 1e-6


@pytest.mark.parametrize("loss", [RelaxedContrastive(), HardDarkRank()])
def test_duplicates_among_others(loss: torch.nn.Module) -> None:
    base = torch.randn(5, 3, dtype=torch.float64)
    student = torch.cat([base, base[:2]]).requires_grad_()
    teacher = torch.randn(7, 4, dtype=torch.float64)
    value = loss(student, teacher)
    value.backward()
    if isinstance(loss, RelaxedContrastive):
        assert value.item() == pytest.approx(slow_relaxed(student.tolist(), teacher.tolist(), 1, 1), rel=1e-9)
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("setting", ["a2_b3_p4", "a3_b3_p4", "a1.5_b2_p6"])
@pytest.mark.parametrize("case", ["small", "paper64", "paper128", "odd"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dark_rank_reproduces_the_published_code(
    reference: np.lib.npyio.NpzFile, setting: str, case: str, dtype: torch.dtype
) -> None:
    alpha, beta, length = (float(part[1:]) for part in setting.split("_"))
    check(reference, f"dark_rank_{setting}/{case}", HardDarkRank(alpha, beta, int(length)).to(dtype), dtype)


@pytest.mark.parametrize("case", ["a", "b"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_feature_losses_reproduce_the_published_code(
    reference: np.lib.npyio.NpzFile, case: str, dtype: torch.dtype
) -> None:
    check(reference, f"attention/{case}", AttentionTransfer(), dtype)
    weight = torch.from_numpy(reference[f"fitnet/{case}/weight"])
    fitnet = FitNet(weight.shape[1], weight.shape[0])
    assert fitnet.transform.weight.shape == weight.shape
    assert fitnet.transform.bias is None
    fitnet.transform.weight.data = weight
    check(reference, f"fitnet/{case}", fitnet.to(dtype), dtype)


def check(reference: np.lib.npyio.NpzFile, key: str, loss: torch.nn.Module, dtype: torch.dtype) -> None:
    student, teacher, expected = (
        torch.from_numpy(reference[f"{key}/{n}"]).to(dtype) for n in ("student", "teacher", "grad")
    )
    student.requires_grad_()
    value = loss(student, teacher)
    value.backward()
    assert value.item() == pytest.approx(float(reference[f"{key}/loss"]), rel=1e-5)
    assert student.grad is not None
    assert (student.grad - expected).norm() / expected.norm() < 1e-4


def test_attention_equals_the_loop() -> None:
    student, teacher = torch.randn(2, 3, 2, 2, dtype=torch.float64), torch.randn(2, 5, 2, 2, dtype=torch.float64)

    def attention(maps: Tensor) -> list[float]:
        flat: list[float] = []
        for image in maps.tolist():
            flat += unit([sum(c[y][x] ** 2 for c in image) / len(image) for y in range(2) for x in range(2)])
        return flat

    errors = [(a - b) ** 2 for a, b in zip(attention(student), attention(teacher), strict=True)]
    assert AttentionTransfer()(student, teacher).item() == pytest.approx(sum(errors) / len(errors))


def test_fitnet_takes_embeddings_as_maps_of_one_pixel() -> None:
    loss = FitNet(3, 5)
    student, teacher = torch.randn(4, 3), torch.randn(4, 5)
    expected = (student @ loss.transform.weight[:, :, 0, 0].T - teacher).square().mean()
    assert loss(student, teacher).item() == pytest.approx(expected.item(), rel=1e-6)


def test_fitnet_starts_uniform_in_a_two_hundredth() -> None:
    weight = FitNet(100, 100).transform.weight.detach() / 0.005  # 10,000 draws
    assert 0.999 < weight.abs().max() <= 1
    for quarter in range(4):  # five standard deviations
        share = ((weight >= quarter / 2 - 1) & (weight < quarter / 2 - 0.5)).float().mean()
        assert share.item() == pytest.approx(0.25, abs=5 * (0.25 * 0.75 / 10_000) ** 0.5)


def test_the_defaults_are_the_published_ones() -> None:
    """alpha 3, beta 3 and 4 neighbors: a loss of 9 rows that no other setting near them has."""
    student, teacher = torch.randn(9, 4, dtype=torch.float64), torch.randn(9, 6, dtype=torch.float64)
    found = HardDarkRank()(student, teacher).item()
    assert found == pytest.approx(slow_dark_rank(student.tolist(), teacher.tolist(), 3, 3, 4), rel=1e-9)
    for other in ((2, 3, 4), (3, 2, 4), (3, 3, 5)):
        assert found != pytest.approx(slow_dark_rank(student.tolist(), teacher.tolist(), *other), rel=1e-3)
