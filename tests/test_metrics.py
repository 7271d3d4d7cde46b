"""Recall@K against sorting every row, the reference values, ties and the block borders."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from rkd_cli import metrics
from rkd_cli.metrics import map_at_r, r_precision, recall_at_k, without_positive


def ranked(x: Tensor, labels: Tensor) -> list[list[bool]]:
    """For each query that has a positive: whether each other row, nearest first, is one."""
    rows, orders = x.tolist(), []
    for query in range(len(rows)):
        others = [i for i in range(len(rows)) if i != query]
        others.sort(key=lambda i: math.dist(rows[query], rows[i]))
        matches = [bool(labels[i] == labels[query]) for i in others]
        if any(matches):
            orders.append(matches)
    return orders


def slow_recall(x: Tensor, labels: Tensor, k: int) -> float:
    hits = [any(matches[:k]) for matches in ranked(x, labels)]
    return sum(hits) / len(hits)


def slow_r_precision(x: Tensor, labels: Tensor) -> float:
    values = [sum(matches[: sum(matches)]) / sum(matches) for matches in ranked(x, labels)]
    return sum(values) / len(values)


def slow_map_at_r(x: Tensor, labels: Tensor) -> float:
    values = []
    for matches in ranked(x, labels):
        r = sum(matches)
        values.append(sum(sum(matches[: i + 1]) / (i + 1) for i in range(r) if matches[i]) / r)
    return sum(values) / len(values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("block", [1, 70, 10**9])
def test_equals_sorting(dtype: torch.dtype, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_BLOCK_ELEMENTS", block)
    x, labels = torch.randn(40, 5, dtype=dtype), torch.randint(0, 8, (40,))
    found = recall_at_k(x, labels, (1, 2, 5, 39, 100))
    assert found == {k: slow_recall(x.double(), labels, k) for k in (1, 2, 5, 39, 100)}
    assert r_precision(x, labels) == pytest.approx(slow_r_precision(x.double(), labels), rel=1e-12)
    assert map_at_r(x, labels) == pytest.approx(slow_map_at_r(x.double(), labels), rel=1e-12)


@pytest.mark.parametrize("case", ["small", "mid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reproduces_the_published_code(reference: np.lib.npyio.NpzFile, case: str, dtype: torch.dtype) -> None:
    ks = reference[f"recall/{case}/k"].tolist()
    x = torch.from_numpy(reference[f"recall/{case}/embeddings"]).to(dtype)
    found = recall_at_k(x, torch.from_numpy(reference[f"recall/{case}/labels"]), ks)
    # the published mean is a float32
    assert [np.float32(found[k]) for k in ks] == [np.float32(r) for r in reference[f"recall/{case}/recall"]]


@pytest.mark.parametrize("block", [1, 10**9])
def test_embeddings_far_from_the_origin_keep_their_order(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_BLOCK_ELEMENTS", block)
    x, labels = (torch.randn(30, 4) * 1e-2 + 40).float(), torch.arange(30) % 6
    assert recall_at_k(x, labels, (1, 2)) == {k: slow_recall(x.double(), labels, k) for k in (1, 2)}
    assert map_at_r(x, labels) == pytest.approx(slow_map_at_r(x.double(), labels), rel=1e-12)


def test_a_duplicate_of_another_class_counts_against_the_query_in_any_block(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(20, 64).repeat(3, 1)  # every row thrice: its positive twin, and one of another class
    labels = torch.cat([torch.arange(20), torch.arange(20), 20 + torch.arange(20) % 10])
    for block in (300, 1000, 10**9):
        monkeypatch.setattr(metrics, "_BLOCK_ELEMENTS", block)
        assert recall_at_k(x, labels, (1, 2)) == {1: 0.0, 2: pytest.approx(40 / 60)}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_embeddings_that_are_not_finite_have_no_recall(value: float) -> None:
    x = torch.tensor([[0.0], [value], [1.0]])
    for metric in (recall_at_k, r_precision, map_at_r):
        with pytest.raises(ValueError, match="not finite"):
            metric(x, torch.zeros(3))


def test_exact_duplicates_of_one_class_are_found() -> None:
    x = torch.randn(6, 4).repeat_interleave(2, dim=0)
    assert recall_at_k(x, torch.arange(6).repeat_interleave(2), (1,)) == {1: 1.0}


def test_collapsed_embeddings_score_nothing_at_one() -> None:
    assert recall_at_k(torch.ones(6, 3), torch.tensor([0, 0, 1, 1, 2, 2]), (1, 4, 5)) == {
        1: 0.0,
        4: 0.0,
        5: 1.0,
    }


@pytest.mark.parametrize("n", [2, 5])
def test_one_class_is_all_hits(n: int) -> None:
    x, labels = torch.randn(n, 3), torch.zeros(n)
    assert (recall_at_k(x, labels, (1,)), r_precision(x, labels), map_at_r(x, labels)) == ({1: 1.0}, 1.0, 1.0)


def test_queries_without_a_positive_are_left_out_and_counted() -> None:
    x = torch.tensor([[0.0], [0.1], [5.0], [9.0]])
    labels = torch.tensor([0, 0, 1, 2])
    assert without_positive(labels) == 2
    assert (recall_at_k(x, labels, (1,)), r_precision(x, labels), map_at_r(x, labels)) == ({1: 1.0}, 1.0, 1.0)
    alone = torch.arange(4)
    assert without_positive(alone) == 4
    assert (recall_at_k(x, alone, (1, 9)), r_precision(x, alone), map_at_r(x, alone)) == ({1: 0.0, 9: 0.0}, 0.0, 0.0)


def test_map_at_r_of_the_papers_toy_case() -> None:
    """Ten positives of which the first and the tenth neighbour are found: R-Precision 0.2, MAP@R 0.12."""
    query = torch.zeros(1, 1)
    order = [0] + [1] * 8 + [0] + [1] * 3 + [0] * 8  # labels of the neighbours, nearest first
    x = torch.cat([query, torch.arange(1, len(order) + 1)[:, None].float()])
    labels = torch.tensor([0, *order])
    found, counts = next(metrics._first_r(x, labels))
    assert (found[0].sum() / counts[0]).item() == pytest.approx(0.2)
    precision = found[0].cumsum(0) / torch.arange(1, found.shape[1] + 1)
    assert ((precision * found[0]).sum() / counts[0]).item() == pytest.approx(0.12)
    assert counts[0] == 10


def test_never_holds_a_full_distance_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_BLOCK_ELEMENTS", 50 * 500)
    largest = 0

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                largest = max(largest, out.numel())
            return out

    with Watch():
        x, labels = torch.randn(500, 8), torch.randint(0, 9, (500,))
        recall_at_k(x, labels, (1,)), r_precision(x, labels), map_at_r(x, labels)
    assert 500 * 8 < largest <= 50 * 500


@pytest.mark.parametrize(
    ("embeddings", "labels", "ks"),
    [
        (torch.zeros(0, 3), torch.zeros(0), (1,)),
        (torch.ones(3, 2), torch.zeros(2), (1,)),
        (torch.ones(3, 2), torch.zeros(3), (0,)),
    ],
)
def test_refuses_what_has_no_recall(embeddings: Tensor, labels: Tensor, ks: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"need|at least 1"):
        recall_at_k(embeddings, labels, ks)
    if ks != (0,):
        for metric in (r_precision, map_at_r):
            with pytest.raises(ValueError, match="need"):
                metric(embeddings, labels)


@pytest.mark.cuda
def test_a_gpu_finds_the_same_neighbours_whatever_the_networks_run_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    x, labels = torch.randn(500, 64) + 3, torch.randint(0, 40, (500,))
    assert recall_at_k(x.cuda(), labels.cuda(), (1, 2, 4)) == recall_at_k(x, labels, (1, 2, 4))
    assert torch.backends.cuda.matmul.allow_tf32
