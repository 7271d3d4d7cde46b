"""Neighbors against sorting every row, in blocks, beside ties, and where float32 products cannot tell them apart."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from largest import LargestTensor
from rkd_cli import retrieval
from rkd_cli.retrieval import nearest

DTYPES = [torch.float32, torch.float64]


def slow_nearest(queries: Tensor, gallery: Tensor, k: int, own: Tensor | None) -> tuple[list[list[float]], list[Any]]:
    distances, rows = [], []
    for number, query in enumerate(queries.tolist()):
        others = [(math.dist(query, row), i) for i, row in enumerate(gallery.tolist())]
        others = sorted(pair for pair in others if own is None or pair[1] != own[number])[:k]
        distances.append([d for d, _ in others])
        rows.append([i for _, i in others])
    return distances, rows


def check(queries: Tensor, gallery: Tensor, k: int, own: Tensor | None = None) -> None:
    distances, rows = nearest(queries, gallery, k, own)
    expected, expected_rows = slow_nearest(queries, gallery, k, own)
    assert rows.tolist() == expected_rows
    assert distances.dtype == torch.float64
    torch.testing.assert_close(distances, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-300)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 5, 39, 40, 1000])
@pytest.mark.parametrize("block", [1, 90, 10**9])
def test_equals_sorting(dtype: torch.dtype, k: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "BLOCK_ELEMENTS", block)
    queries, gallery = torch.randn(7, 6, dtype=dtype), torch.randn(40, 6, dtype=dtype)
    check(queries, gallery, k)
    check(gallery, gallery, k, torch.arange(40))
    some = torch.tensor([3, 39, 0])
    check(gallery[some], gallery, k, some)


def test_a_gallery_serves_the_queries_of_another_network() -> None:
    gallery = F.normalize(torch.randn(50, 8, dtype=torch.float64), dim=1)
    queries = F.normalize(gallery[:9] + 0.1 * torch.randn(9, 8), dim=1).float()
    check(queries, gallery, 4)
    check(queries.bfloat16(), gallery.float(), 4)


@pytest.mark.parametrize("radius", [1e-2, 1e-3, 3e-4, 1e-5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_neighbors_that_are_close_beside_their_length(radius: float, dtype: torch.dtype) -> None:
    center = F.normalize(torch.randn(1, 32, dtype=torch.float64), dim=1)
    # two heaps, so that the mean lies in neither
    x = torch.cat([center + radius * torch.randn(30, 32), -center + radius * torch.randn(30, 32)]).to(dtype)
    check(x, x, 3, torch.arange(60))


def test_the_last_neighbor_may_be_the_only_one_in_doubt() -> None:
    """A duplicate is the nearest for sure; float32 products cannot tell which of a shell of rows comes next."""
    queries = F.normalize(torch.randn(5, 32), dim=1)
    radii = 1e-2 * (1 + 1e-5 * torch.rand(5, 300, 1))
    shells = queries[:, None] + radii * F.normalize(torch.randn(5, 300, 32), dim=2)
    check(queries, torch.cat([queries, shells.flatten(0, 1)]), 2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_far_from_the_origin(dtype: torch.dtype) -> None:
    x = (torch.randn(60, 4) * 1e-2 + 40).to(dtype)
    check(x, x, 5, torch.arange(60))


def test_values_whose_squares_overflow() -> None:
    x = torch.randn(40, 4) * 1e25
    check(x, x, 3, torch.arange(40))


def test_equal_distances_come_in_the_order_of_the_gallery() -> None:
    gallery = torch.randn(6, 16).repeat(5, 1)
    check(gallery[:6], gallery, 5)
    check(gallery[:6], gallery, 30)


def test_the_query_itself_is_known_by_its_row_not_by_its_distance() -> None:
    gallery = torch.randn(5, 3).repeat_interleave(2, dim=0)
    distances, rows = nearest(gallery, gallery, 1, torch.arange(10))
    assert rows[:, 0].tolist() == [1, 0, 3, 2, 5, 4, 7, 6, 9, 8]
    assert (distances == 0).all()
    distances, rows = nearest(torch.ones(4, 3), torch.ones(4, 3), 9, torch.arange(4))
    assert rows.tolist() == [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]]


def test_more_rows_at_the_last_distance_than_fit() -> None:
    gallery = torch.cat([torch.zeros(300, 4), torch.ones(1, 4)])
    distances, rows = nearest(torch.ones(1, 4), gallery, 20)
    assert rows[0, 0] == 300
    assert len(set(rows[0].tolist())) == 20
    assert distances[0].tolist() == [0.0] + [2.0] * 19


def test_autocast_and_reduced_precision_change_nothing() -> None:
    backends: Any = torch.backends
    heaps = torch.ones(2, 32) * torch.tensor([[1.0], [-1.0]])
    x = heaps.repeat_interleave(1000, dim=0) + 0.1 * torch.randn(2000, 32)  # in which bf16 tells few rows apart
    expected = nearest(x[:100], x, 20, torch.arange(100))
    backends.fp32_precision = "tf32"
    try:
        with torch.autocast("cpu", torch.bfloat16):
            found = nearest(x[:100], x, 20, torch.arange(100))
        assert (backends.fp32_precision, backends.mkldnn.matmul.fp32_precision) == ("tf32", "tf32")
    finally:
        backends.fp32_precision = "none"
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


class TypesOfProducts(torch.overrides.TorchFunctionMode):
    """While it is entered, keeps the types of the products that torch adds up."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[torch.dtype] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.addmm:
            self.found.add(out.dtype)
        return out


@pytest.mark.parametrize(("radius", "expected"), [(1.0, {torch.float32}), (1e-5, {torch.float32, torch.float64})])
def test_only_queries_in_doubt_cost_products_in_float64(radius: float, expected: set[torch.dtype]) -> None:
    x = torch.tensor([[1.0], [-1.0]]).repeat_interleave(100, dim=0) + radius * torch.randn(200, 8)
    with TypesOfProducts() as types:
        nearest(x, x, 3, torch.arange(200))
    assert types.found == expected


@pytest.mark.parametrize("k", [2, 499])
def test_never_holds_more_than_a_block(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "BLOCK_ELEMENTS", 50 * 500)
    x = torch.randn(1500, 16)
    with LargestTensor() as largest:
        nearest(x, x, k, torch.arange(1500))
    results = 1500 * k
    assert 500 * 40 < largest.elements <= max(1 << 18, results)  # the pairs that are subtracted at once are the largest


@pytest.mark.parametrize(
    ("queries", "gallery", "k", "own", "why"),
    [
        (torch.ones(2, 3), torch.ones(4, 3), 0, None, "at least 1"),
        (torch.ones(2, 3), torch.ones(4, 2), 1, None, "need"),
        (torch.ones(3), torch.ones(4, 3), 1, None, "need"),
        (torch.ones(0, 3), torch.ones(4, 3), 1, None, "need"),
        (torch.ones(2, 3), torch.ones(0, 3), 1, None, "need"),
        (torch.ones(1, 3), torch.ones(1, 3), 1, torch.tensor([0]), "another gallery row"),
        (torch.ones(2, 3), torch.ones(4, 3), 1, torch.tensor([0]), "own must"),
        (torch.full((2, 3), math.nan), torch.ones(4, 3), 1, None, "not finite"),
        (torch.ones(2, 3), torch.full((4, 3), math.inf), 1, None, "not finite"),
    ],
)
def test_refuses_what_has_no_neighbors(queries: Tensor, gallery: Tensor, k: int, own: Tensor | None, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        nearest(queries, gallery, k, own)


@pytest.mark.cuda
@pytest.mark.parametrize("radius", [1.0, 3e-4])
def test_a_gpu_finds_the_same(radius: float) -> None:
    x = F.normalize(torch.ones(1, 64), dim=1) * torch.tensor([[1.0], [-1.0]]).repeat(250, 1) + radius * torch.randn(
        500, 64
    )
    expected, rows = nearest(x, x, 5, torch.arange(500))
    found, found_rows = nearest(x.cuda(), x.cuda(), 5, torch.arange(500, device="cuda"))
    assert torch.equal(found_rows.cpu(), rows)
    torch.testing.assert_close(found.cpu(), expected)
