"""Distances against subtraction row by row, their gradient against its formula, and products that nothing rounds."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from largest import LargestTensor
from rkd_cli import geometry
from rkd_cli.geometry import exact_products, pairwise_distances, squared_differences, squared_distances, unit_rows

DTYPES = [torch.float32, torch.float64]
CPU = torch.device("cpu")


def with_pair(gap: float, scale: float = 1.0) -> Tensor:
    """Rows of which the first two are ``gap`` apart and the last is ``scale`` times as far out as the others."""
    x = torch.randn(12, 16)
    step = torch.randn(16)
    x[1] = x[0] + gap * step / step.norm()
    x[-1] *= scale
    return x


def slow_squared(x: Tensor) -> Tensor:
    rows = x.tolist()
    return torch.tensor([[math.dist(a, b) ** 2 for b in rows] for a in rows], dtype=torch.float64)


ROWS = {
    "plain": torch.randn(12, 16, generator=torch.Generator().manual_seed(1)),
    "far from the origin": torch.randn(12, 16, generator=torch.Generator().manual_seed(2)) * 0.01 + 5,
    "one row": torch.ones(1, 16),
    "two clusters": torch.tensor([[1.0], [-1.0]]).repeat_interleave(6, dim=0)
    + 1e-4 * torch.randn(12, 16, generator=torch.Generator().manual_seed(3)),
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_subtraction(name: str, dtype: torch.dtype) -> None:
    x = ROWS[name].to(dtype)
    found = squared_distances(x)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, slow_squared(x), rtol=1e-9, atol=0)


@pytest.mark.parametrize("gap", [1e-2, 1e-4, 1e-5])
@pytest.mark.parametrize("scale", [1.0, 1e4, 1e6])
def test_close_rows_keep_their_distance_beside_an_outlier(gap: float, scale: float) -> None:
    x = with_pair(gap, scale)
    torch.testing.assert_close(squared_distances(x), slow_squared(x), rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_subtracting_every_pair_gives_the_same(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU does, which would have to wait to find the close pairs first."""
    nearly_equal = torch.randn(6, 16)
    nearly_equal[1], nearly_equal[2] = nearly_equal[0], torch.nextafter(nearly_equal[0], torch.tensor(10.0))
    missing = torch.randn(5, 3)
    missing[2, 1] = math.nan
    cases = [*ROWS.values(), nearly_equal, missing, *(with_pair(gap, 1e4) for gap in (1e-2, 1e-4, 1e-5))]
    expected = [squared_distances(x.to(dtype)) for x in cases]
    monkeypatch.setattr(geometry, "_subtracts_every_pair", lambda x: True)
    for x, squared in zip(cases, expected, strict=True):
        found = squared_distances(x.to(dtype))
        torch.testing.assert_close(found, squared, rtol=1e-9, atol=0, equal_nan=True)
        assert torch.equal((found == 0), (squared == 0))


@pytest.mark.parametrize(("gap", "scale"), [(1.0, 1.0), (1e-4, 1.0), (1e-5, 1.0), (1e-4, 1e4)])
def test_the_gradient_equals_its_formula(gap: float, scale: float) -> None:
    x = with_pair(gap, scale).requires_grad_()
    pull = torch.randn(12, 12, dtype=torch.float64)
    pull[0, 1] = 1 / gap**2  # as 1 / D has it, so that the pair's own pull is not lost among the others
    (found,) = torch.autograd.grad(squared_distances(x), x, pull)
    rows = x.detach().double()
    expected = torch.zeros_like(rows)
    for i in range(12):
        for j in range(12):
            expected[i] += 2 * (pull[i, j] + pull[j, i]) * (rows[i] - rows[j])
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item() / scale)


def test_the_gradient_far_from_the_origin_in_one_direction() -> None:
    x = torch.randn(12, 16, dtype=torch.float64)
    x[:, 0] += 1e8
    pull = torch.randn(12, 12, dtype=torch.float64)
    x.requires_grad_()
    (found,) = torch.autograd.grad(squared_distances(x), x, pull)
    differences = x.detach()[:, None] - x.detach()
    expected = (2 * (pull + pull.T)[:, :, None] * differences).sum(dim=1)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("distances", [squared_distances, pairwise_distances])
def test_the_gradient_equals_finite_differences(distances: Any) -> None:
    assert torch.autograd.gradcheck(distances, torch.randn(5, 3, dtype=torch.float64, requires_grad=True))


def test_rows_that_the_last_bit_tells_apart_are_one_point() -> None:
    x = torch.randn(6, 16)
    x[1], x[2] = x[0], torch.nextafter(x[0], torch.tensor(10.0))
    squared = squared_distances(x)
    assert (squared[:3, :3] == 0).all()
    assert (squared[:3, 3:] > 0).all()
    assert squared_distances(x.double())[0, 2] > 0, "float64 has bits to spare"
    expected = torch.full((3, 3), 1e-6, dtype=torch.float64).fill_diagonal_(0)
    torch.testing.assert_close(pairwise_distances(x)[:3, :3], expected)


def test_nan_reaches_every_distance() -> None:
    x = torch.randn(5, 3)
    x[2, 1] = math.nan
    assert squared_distances(x)[~torch.eye(5, dtype=torch.bool)].isnan().all()


def test_differences_of_many_pairs() -> None:
    x, y = torch.randn(30, 512), torch.randn(20, 512)
    i, j = torch.randint(0, 30, (2000,)), torch.randint(0, 20, (2000,))
    found = squared_differences(x, y, i, j)
    for pair in range(0, 2000, 97):
        expected = math.dist(x[i[pair]].tolist(), y[j[pair]].tolist()) ** 2
        assert found[pair].item() == pytest.approx(expected, rel=1e-12)
    assert len(squared_differences(x, y, i[:0], j[:0])) == 0


def test_a_collapsed_batch_stays_within_its_memory() -> None:
    x = 1 + 1e-5 * torch.randn(200, 256)
    x[:100] *= -1  # every pair of a half is doubtful: 9,900 of them, 2.5 million coordinates
    with LargestTensor() as largest:
        squared_distances(x)
    assert 200 * 256 < largest.elements <= 1 << 18


SWITCHES = {
    "none": "pass",
    "all tf32": "torch.backends.fp32_precision = 'tf32'",
    "all ieee": "torch.backends.fp32_precision = 'ieee'",
    "cuda tf32": "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "cpu bf16": "torch.backends.mkldnn.matmul.fp32_precision = 'bf16'",
    "old high": "torch.set_float32_matmul_precision('high')",
    "old switch": "torch.backends.cuda.matmul.allow_tf32 = True",
}


def settings() -> dict[str, str]:
    backends: Any = torch.backends
    return {
        "all": backends.fp32_precision,
        "cuda": backends.cuda.matmul.fp32_precision,
        "cpu": backends.mkldnn.matmul.fp32_precision,
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, *DTYPES])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_unit_rows_have_length_one_and_the_rows_direction(dtype: torch.dtype, scale: float) -> None:
    x = (torch.randn(5, 3) * scale).to(dtype)
    found = unit_rows(x)
    assert found.dtype == torch.float64
    for row, unit in zip(x.tolist(), found.tolist(), strict=True):
        assert unit == pytest.approx([v / math.hypot(*row) for v in row], rel=1e-12)


def test_unit_rows_pass_the_true_gradient_and_none_from_zeros() -> None:
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(unit_rows, x)
    zero = torch.zeros(2, 3, requires_grad=True)
    found = unit_rows(zero)
    assert not found.any()
    (gradient,) = torch.autograd.grad(found.sum(), zero)
    assert not gradient.any()
    assert unit_rows(torch.tensor([[math.nan, 1.0]])).isnan().all()


@pytest.fixture
def switches() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")
    backends: Any = torch.backends
    backends.fp32_precision = backends.cuda.matmul.fp32_precision = backends.mkldnn.matmul.fp32_precision = "none"


@pytest.mark.usefixtures("switches")
@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_products_are_exact_and_the_switches_stay_as_they_were(switch: str, device: str) -> None:
    exec(SWITCHES[switch])
    before = settings()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of autocast, where there is no CUDA
        with exact_products(torch.device(device)):
            assert settings()["cuda" if device == "cuda" else "cpu"] in ("none", "ieee")
    assert settings() == before
    if switch == "all tf32":
        exec(SWITCHES["all ieee"])
        assert set(settings().values()) == {"ieee"}, "what followed the switch of all still does"
    if switch.startswith("old"):
        assert torch.get_float32_matmul_precision() == "high", "readable, without a complaint about mixed switches"


@pytest.mark.usefixtures("switches")
def test_the_switches_come_back_after_an_error() -> None:
    exec(SWITCHES["cpu bf16"])
    with pytest.raises(ZeroDivisionError), exact_products(CPU):
        raise ZeroDivisionError
    assert settings()["cpu"] == "bf16"


def test_autocast_is_off_inside() -> None:
    x = torch.randn(4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        with exact_products(CPU):
            assert (x @ x).dtype == torch.float32
        assert (x @ x).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_unit_rows_have_length_one_at_any_scale_and_zeros_stay(dtype: torch.dtype) -> None:
    x = torch.randn(5, 3).to(dtype) * torch.tensor([1e-30, 1e-9, 0, 1, 1e30]).to(dtype)[:, None]
    x.requires_grad_()
    unit = unit_rows(x)
    assert unit.dtype == torch.float64
    lengths = unit.square().sum(dim=1)
    torch.testing.assert_close(lengths, torch.tensor([1, 1, 0, 1, 1], dtype=torch.float64))
    (gradient,) = torch.autograd.grad(unit[:, 0].sum(), x)
    assert torch.isfinite(gradient).all()
    assert (gradient[2] == 0).all()
