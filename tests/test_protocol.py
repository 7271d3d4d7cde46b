"""Queries in a gallery: the rule of Market-1501, against a loop, scikit-learn and counting by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from largest import LargestTensor
from rkd_cli import metrics
from rkd_cli.metrics import (
    Protocol,
    Retrieval,
    asymmetric_recall_at_k,
    at_r,
    protocol_metrics,
    recall_at_k,
    retrieval_metrics,
    without_positive,
)

KS = (1, 2, 5, 20)


def answers(x: Tensor, labels: Tensor, roles: str, cameras: Tensor | None) -> list[list[bool]]:
    """For each query with a positive: whether each gallery image that counts, nearest first and negatives before ties,
    is one. ``roles`` has q, g or b for each row."""
    rows, orders = x.tolist(), []
    for q, role in enumerate(roles):
        if role == "g":
            continue
        found = []
        for g, other in enumerate(roles):
            same = bool(labels[q] == labels[g])
            if other == "q" or g == q or (cameras is not None and same and bool(cameras[q] == cameras[g])):
                continue
            found.append((math.dist(rows[q], rows[g]), same))
        if any(same for _, same in found):
            orders.append([same for _, same in sorted(found)])
    return orders


def slow(orders: list[list[bool]], queries: int) -> Retrieval:
    """The formulas, rank by rank."""
    recall = dict.fromkeys(KS, 0.0)
    sums = np.zeros(4)
    for matches in orders:
        ranks = [rank for rank, match in enumerate(matches, 1) if match]
        r = len(ranks)
        for k in KS:
            recall[k] += any(matches[:k])
        precisions = [sum(matches[:rank]) / rank for rank in ranks]
        among_r = [p for p, rank in zip(precisions, ranks, strict=True) if rank <= r]
        sums += (sum(matches[:r]) / r, sum(among_r) / r, sum(precisions) / r, r / ranks[-1])
    count = max(1, len(orders))
    r, map_r, ap, inp = sums / count
    return Retrieval({k: hits / count for k, hits in recall.items()}, r, map_r, ap, inp, queries - len(orders))


def protocol_of(roles: str, cameras: Tensor | None) -> Protocol:
    queries, gallery = ([i for i, role in enumerate(roles) if role != other] for other in "gq")
    return Protocol(torch.tensor(queries), torch.tensor(gallery), cameras)


def case(seed: int) -> tuple[Tensor, Tensor, str, Tensor | None]:
    """Embeddings with and without ties, labels, roles and cameras."""
    rng = np.random.default_rng(seed)
    n, d = int(rng.integers(3, 24)), int(rng.integers(1, 6))
    x = rng.integers(0, 3, (n, d)) if seed % 2 else rng.standard_normal((n, d))
    labels = torch.from_numpy(rng.integers(0, rng.integers(1, 12), n))
    roles = "qg" + "".join(rng.choice([*"qgb"], n - 2))
    cameras = torch.from_numpy(rng.integers(0, 3, n)) if seed % 3 else None
    return torch.from_numpy(x).to(torch.float32 if seed % 5 else torch.float64), labels, roles, cameras


def assert_close(found: Retrieval, expected: Retrieval) -> None:
    assert found.recall == pytest.approx(expected.recall, rel=1e-12)
    assert found[1:] == pytest.approx(expected[1:], rel=1e-12)


@pytest.mark.parametrize("block", [1, 60, 10**9])
def test_a_thousand_random_cases_equal_a_loop(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "BLOCK_ELEMENTS", block)
    for seed in range(1000) if block == 60 else range(12):
        x, labels, roles, cameras = case(seed)
        queries = len(roles) - roles.count("g")
        found = protocol_metrics(x, x, labels, protocol_of(roles, cameras), KS)
        assert_close(found, slow(answers(x, labels, roles, cameras), queries))


def test_average_precision_is_that_of_scikit_learn() -> None:
    ap = pytest.importorskip("sklearn.metrics").average_precision_score
    for seed in range(0, 80, 2):  # without ties
        x, labels, roles, cameras = case(seed)
        values = [ap(matches, -np.arange(len(matches))) for matches in answers(x, labels, roles, cameras)]
        found = protocol_metrics(x, x, labels, protocol_of(roles, cameras), KS).map
        assert found == pytest.approx(np.mean(values) if values else 0.0, rel=1e-9)


def test_the_rule_of_market_1501_counted_by_hand() -> None:
    """Images on a line, as identity, camera and place.

    Query 1c1 at 0 meets (1c1 at 1, its own camera: out), 3c3 at 2, the distractor 0c1 at 3, 2c1 at 4, 1c2 at 5, 1c3 at
    6, 2c2 at 9: positives at ranks 4 and 5 of R = 2. Query 2c2 at 10 meets (2c2 at 9: out), 1c3, 1c2, 2c1 at 4: rank 3
    of R = 1. Query 3c3 has a positive in its own camera alone and is left out.
    """
    x = torch.tensor([0, 10, 2, 1, 2, 3, 4, 5, 6, 9.0])[:, None]
    labels, cameras = torch.tensor([[1, 2, 3, 1, 3, 0, 2, 1, 1, 2], [1, 2, 3, 1, 3, 1, 1, 2, 3, 2]])
    found = protocol_metrics(x, x, labels, Protocol(torch.arange(3), torch.arange(3, 10), cameras), (1, 3, 4))
    assert found.recall == {1: 0.0, 3: 0.5, 4: 1.0}
    assert found.map == pytest.approx(((1 / 4 + 2 / 5) / 2 + 1 / 3) / 2)
    assert found.minp == pytest.approx((2 / 5 + 1 / 3) / 2)
    assert (found.r_precision, found.map_at_r, found.without_positive) == (0.0, 0.0, 1)
    # the distractor has no camera rule to fear: without it every positive is one rank earlier
    rows = torch.tensor([3, 4, 6, 7, 8, 9])
    assert protocol_metrics(x, x, labels, Protocol(torch.arange(3), rows, cameras), (3,)).recall == {3: 1.0}


def test_all_images_as_queries_give_the_figures_without_roles() -> None:
    """Also where rounding decides, and with ties."""
    for seed in range(20):
        x = torch.from_numpy(np.random.default_rng(seed).standard_normal((60, 16))).float()
        x = x if seed % 2 else 100 + 1e-4 * x.round()
        labels, every = torch.arange(60) % 13, torch.arange(60)
        found = protocol_metrics(x, x, labels, Protocol(every, every), KS)
        assert found.recall == recall_at_k(x, labels, KS)
        assert found[1:3] == pytest.approx(at_r(x, labels), rel=1e-12)
        assert found.without_positive == without_positive(labels)


def test_recall_takes_the_protocol_of_queries_and_gallery() -> None:
    x, labels, roles, cameras = case(7)
    protocol = protocol_of(roles, cameras)
    expected = protocol_metrics(x, x, labels, protocol, KS).recall
    assert recall_at_k(x, labels, KS, protocol=protocol) == expected
    assert asymmetric_recall_at_k(x, x, labels, KS, protocol) == expected
    assert asymmetric_recall_at_k(x, -x, labels, KS, protocol) == protocol_metrics(x, -x, labels, protocol, KS).recall


def test_collapsed_embeddings_score_what_ties_leave() -> None:
    x, labels = torch.ones(30, 4), torch.arange(30) % 3
    found = protocol_metrics(x, x, labels, Protocol(torch.arange(10), torch.arange(10, 30)), (1,))
    assert (found.recall, found.r_precision, found.map_at_r) == ({1: 0.0}, 0.0, 0.0)
    assert 0 < found.map < 0.3  # of ranks 14 to 20


def test_no_query_or_no_answer_is_zero() -> None:
    x, none = torch.randn(4, 2), torch.arange(0)
    for protocol in (Protocol(none, torch.arange(4)), Protocol(torch.arange(4), none)):
        assert protocol_metrics(x, x, torch.zeros(4), protocol, (1,))[:2] == ({1: 0.0}, 0.0)
    found = protocol_metrics(x, x, torch.arange(4), Protocol(torch.arange(2), torch.arange(2, 4)), (1,))
    assert (found.recall, found.map, found.without_positive) == ({1: 0.0}, 0.0, 2)


def test_no_full_matrix_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "BLOCK_ELEMENTS", 50 * 1500)
    x, labels = torch.randn(3000, 8), torch.arange(3000) // 4
    with LargestTensor() as largest:
        protocol_metrics(x, x, labels, Protocol(torch.arange(1500), torch.arange(1500, 3000)))
    assert largest.elements <= 1 << 18


@pytest.mark.parametrize("wrong", ["nan", "sizes", "k", "labels"])
def test_refuses_what_cannot_be_compared(wrong: str) -> None:
    queries, gallery = torch.ones(2, 3), torch.ones(4, 2 if wrong == "sizes" else 3)
    gallery[0, 0] = math.nan if wrong == "nan" else 1
    labels = torch.zeros(3 if wrong == "labels" else 2)
    with pytest.raises(ValueError, match=r"finite|dimensions|at least 1|need"):
        retrieval_metrics(queries, gallery, labels, torch.zeros(4), (0,) if wrong == "k" else (1,))
