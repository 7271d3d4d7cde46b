"""Recall@K against sorting every row, the reference values, ties and the block borders."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from rkd_cli import metrics
from rkd_cli.metrics import recall_at_k


def slow_recall(x: Tensor, labels: Tensor, k: int) -> float:
    rows, hits = x.tolist(), 0
    for query in range(len(rows)):
        others = [i for i in range(len(rows)) if i != query]
        others.sort(key=lambda i: math.dist(rows[query], rows[i]))
        hits += any(labels[i] == labels[query] for i in others[:k])
    return hits / len(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("block", [1, 70, 10**9])
def test_equals_sorting(dtype: torch.dtype, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_BLOCK_ELEMENTS", block)
    x, labels = torch.randn(40, 5, dtype=dtype), torch.randint(0, 8, (40,))
    found = recall_at_k(x, labels, (1, 2, 5, 39, 100))
    assert found == {k: slow_recall(x.double(), labels, k) for k in (1, 2, 5, 39, 100)}


@pytest.mark.parametrize("case", ["small", "mid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reproduces_the_published_code(reference: np.lib.npyio.NpzFile, case: str, dtype: torch.dtype) -> None:
    ks = reference[f"recall/{case}/k"].tolist()
    x = torch.from_numpy(reference[f"recall/{case}/embeddings"]).to(dtype)
    found = recall_at_k(x, torch.from_numpy(reference[f"recall/{case}/labels"]), ks)
    # the published mean is a float32
    assert [np.float32(found[k]) for k in ks] == [np.float32(r) for r in reference[f"recall/{case}/recall"]]


def test_exact_duplicates_of_one_class_are_found() -> None:
    x = torch.randn(6, 4).repeat_interleave(2, dim=0)
    assert recall_at_k(x, torch.arange(6).repeat_interleave(2), (1,)) == {1: 1.0}


def test_collapsed_embeddings_score_nothing_at_one() -> None:
    assert recall_at_k(torch.ones(6, 3), torch.tensor([0, 0, 1, 1, 2, 2]), (1, 4, 5)) == {
        1: 0.0,
        4: 0.0,
        5: 1.0,
    }


def test_one_class_is_all_hits_and_lonely_classes_all_misses() -> None:
    assert recall_at_k(torch.randn(5, 3), torch.zeros(5), (1,)) == {1: 1.0}
    assert recall_at_k(torch.randn(5, 3), torch.arange(5), (1, 9)) == {1: 0.0, 9: 0.0}
    assert recall_at_k(torch.randn(2, 3), torch.zeros(2), (1,)) == {1: 1.0}


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
        recall_at_k(torch.randn(500, 8), torch.randint(0, 9, (500,)), (1,))
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
