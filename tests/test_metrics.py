"""Recall@K, R-Precision and MAP@R against sorting every row, the reference values, ties and the block borders."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from largest import LargestTensor
from rkd_cli import metrics, retrieval
from rkd_cli.metrics import (
    agreement,
    asymmetric_recall_at_k,
    at_r,
    map_at_r,
    paired_bootstrap,
    r_precision,
    recall_at_k,
    rescored_recall_at_k,
    without_positive,
)


def ranked(x: Tensor, labels: Tensor) -> list[list[bool]]:
    """For each query that has a positive: whether each other row, nearest first and negatives before ties, is one."""
    rows, orders = x.tolist(), []
    for query in range(len(rows)):
        others = [i for i in range(len(rows)) if i != query]
        pairs = sorted((math.dist(rows[query], rows[i]), bool(labels[i] == labels[query])) for i in others)
        matches = [positive for _, positive in pairs]
        if any(matches):
            orders.append(matches)
    return orders


def slow_recall(orders: list[list[bool]], k: int) -> float:
    hits = [any(matches[:k]) for matches in orders]
    return sum(hits) / len(hits)


def slow_r_precision(orders: list[list[bool]]) -> float:
    values = [sum(matches[: sum(matches)]) / sum(matches) for matches in orders]
    return sum(values) / len(values)


def slow_map_at_r(orders: list[list[bool]]) -> float:
    values = []
    for matches in orders:
        r = sum(matches)
        values.append(sum(sum(matches[: i + 1]) / (i + 1) for i in range(r) if matches[i]) / r)
    return sum(values) / len(values)


def slow_asymmetric(queries: Tensor, gallery: Tensor, labels: Tensor, k: int) -> float:
    """Fewer than K negatives as near as the nearest positive, for each query that has a positive."""
    rows, hits = gallery.tolist(), []
    for number, query in enumerate(queries.tolist()):
        others = [
            (math.dist(query, row), bool(labels[i] == labels[number])) for i, row in enumerate(rows) if i != number
        ]
        positives = [distance for distance, positive in others if positive]
        if positives:
            hits.append(sum(d <= min(positives) for d, positive in others if not positive) < k)
    return sum(hits) / len(hits) if hits else 0.0


def check_asymmetric(queries: Tensor, gallery: Tensor, labels: Tensor) -> None:
    ks = (1, 2, 5, 39, 100)
    expected = {k: slow_asymmetric(queries, gallery, labels, k) for k in ks}
    assert asymmetric_recall_at_k(queries, gallery, labels, ks) == pytest.approx(expected, rel=1e-12)


def slow_rescored(
    pair: tuple[Tensor, Tensor], codes: tuple[Tensor, Tensor], labels: Tensor, k: int, shortlist: int
) -> float:
    (queries, gallery), hits = pair, []
    for i in range(len(labels)):
        others = [j for j in range(len(labels)) if j != i]
        positive = {j: bool(labels[i] == labels[j]) for j in others}
        first = sorted(others, key=lambda j: (math.dist(codes[0][i], codes[1][j]), positive[j]))[: shortlist * k]
        again = sorted(first, key=lambda j: (math.dist(queries[i], gallery[j]), positive[j]))
        if any(positive.values()):
            hits.append(any(positive[j] for j in again[:k]))
    return sum(hits) / len(hits)


def check(x: Tensor, labels: Tensor) -> None:
    ks, orders = (1, 2, 5, 39, 100), ranked(x, labels)
    found = recall_at_k(x, labels, ks)
    assert asymmetric_recall_at_k(x, x, labels, ks) == found
    assert found == pytest.approx({k: slow_recall(orders, k) for k in ks}, rel=1e-12)
    assert r_precision(x, labels) == pytest.approx(slow_r_precision(orders), rel=1e-12)
    assert map_at_r(x, labels) == pytest.approx(slow_map_at_r(orders), rel=1e-12)


@pytest.fixture(params=[1, 300, 10**9])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Elements of a block of distances: of one query, of some, of all."""
    for module in (metrics, retrieval):
        monkeypatch.setattr(module, "BLOCK_ELEMENTS", request.param)
    return int(request.param)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("classes", [1, 8, 30])
def test_equals_sorting(dtype: torch.dtype, classes: int) -> None:
    check(torch.randn(40, 5, dtype=dtype), torch.randint(0, classes, (40,)))


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("radius", [1e-2, 1e-3, 3e-4, 1e-5])
def test_neighbors_that_are_close_beside_their_length(radius: float) -> None:
    """Two heaps of pairs, so that the mean lies in neither: float32 products see each heap as one point."""
    center = torch.randn(1, 32)
    rows = torch.cat([center, -center]).repeat_interleave(20, dim=0) + radius * torch.randn(40, 32)
    x, labels = torch.cat([rows, rows + 0.1 * radius * torch.randn(40, 32)]), torch.arange(40).repeat(2)
    assert slow_recall(ranked(x, labels), 1) == 1.0
    check(x, labels)


def test_autocast_and_reduced_precision_change_nothing() -> None:
    backends: Any = torch.backends
    labels = torch.arange(1000) // 5
    x = F.normalize(3 + torch.randn(200, 64).repeat_interleave(5, dim=0) + 1.2 * torch.randn(1000, 64), dim=1)
    expected = recall_at_k(x, labels), r_precision(x, labels), map_at_r(x, labels)
    backends.fp32_precision = "tf32"
    try:
        with torch.autocast("cpu", torch.bfloat16):
            assert (recall_at_k(x, labels), r_precision(x, labels), map_at_r(x, labels)) == expected
        assert (backends.fp32_precision, backends.mkldnn.matmul.fp32_precision) == ("tf32", "tf32")
    finally:
        backends.fp32_precision = "none"


@pytest.mark.parametrize("case", ["small", "mid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reproduces_the_published_code(reference: np.lib.npyio.NpzFile, case: str, dtype: torch.dtype) -> None:
    ks = reference[f"recall/{case}/k"].tolist()
    x = torch.from_numpy(reference[f"recall/{case}/embeddings"]).to(dtype)
    found = recall_at_k(x, torch.from_numpy(reference[f"recall/{case}/labels"]), ks)
    # the published mean is a float32
    assert [np.float32(found[k]) for k in ks] == [np.float32(r) for r in reference[f"recall/{case}/recall"]]


@pytest.mark.usefixtures("block")
def test_embeddings_far_from_the_origin_keep_their_order() -> None:
    check(torch.randn(30, 4) * 1e-2 + 40, torch.arange(30) % 6)


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_recall_looks_up_no_query_that_rounding_cannot_decide(offset: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "nearest", None)
    x = 10 * torch.randn(50, 16).repeat(4, 1) + torch.randn(200, 16) + offset
    assert recall_at_k(x, torch.arange(200) % 50, (1,)) == {1: 1.0}


@pytest.mark.usefixtures("block")
def test_a_duplicate_of_another_class_counts_against_the_query_in_any_block() -> None:
    x = torch.randn(20, 64).repeat(3, 1)  # every row thrice: its positive twin, and one of another class
    labels = torch.cat([torch.arange(20), torch.arange(20), 20 + torch.arange(20) % 10])
    assert recall_at_k(x, labels, (1, 2)) == {1: 0.0, 2: pytest.approx(40 / 60)}
    check(x, labels)


@pytest.mark.parametrize(("points", "classes"), [(1, 7), (2, 2), (4, 20)])
def test_ties_beyond_every_depth_count_against_the_query(block: int, points: int, classes: int) -> None:
    """Many rows at each of few points, in an order that would find positives first or last if it decided."""
    x = torch.randn(points, 8)[torch.arange(60) % points]
    labels = torch.arange(60) * classes // 60
    orders = torch.randperm(60), torch.arange(60), torch.arange(60).flip(0)
    for order in orders[: 1 if block == 1 else 3]:  # in blocks of one element each takes seconds
        check(x[order], labels[order])


@pytest.mark.parametrize("metric", [r_precision, map_at_r])
def test_collapsed_embeddings_have_no_precision(metric: Any) -> None:
    assert metric(torch.ones(60, 8), torch.arange(60) // 6) == 0


@pytest.mark.parametrize("metric", [recall_at_k, r_precision, map_at_r])
def test_embeddings_stay_as_they_were(metric: Any) -> None:
    x = torch.randn(20, 4) + 3
    before = x.clone()
    metric(x, torch.arange(20) // 2)
    agreement(x, x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_embeddings_that_are_not_finite_have_no_recall(value: float) -> None:
    x = torch.tensor([[0.0], [value], [1.0]])
    for metric in (recall_at_k, r_precision, map_at_r):
        with pytest.raises(ValueError, match="not finite"):
            metric(x, torch.zeros(3))
    for pair in ((x, torch.zeros(3, 1)), (torch.zeros(3, 1), x)):
        with pytest.raises(ValueError, match="not finite"):
            asymmetric_recall_at_k(*pair, torch.zeros(3))
        with pytest.raises(ValueError, match="not finite"):
            rescored_recall_at_k(*pair, torch.zeros(3, 1), torch.zeros(3, 1), torch.zeros(3))


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


def test_precisions_worked_out_by_hand() -> None:
    """Rows of class 0 at 0, 1 and 7, each with two positives, and a row without any at 3.

    From 0 the neighbors are 1, (3), 7: half of the first two are positives, and AP is 1/2 (1/1). From 1 they are 0,
    (3), 7: the same. From 7 they are (3), 1, 0: half again, but AP is 1/2 (1/2).
    """
    x, labels = torch.tensor([[0.0], [1.0], [3.0], [7.0]]), torch.tensor([0, 0, 1, 0])
    assert r_precision(x, labels) == pytest.approx(1 / 2)
    assert map_at_r(x, labels) == pytest.approx((1 / 2 + 1 / 2 + 1 / 4) / 3)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.float32), (torch.float64, torch.float64), (torch.float32, torch.float64)]
)
@pytest.mark.parametrize("classes", [1, 8, 30])
def test_another_networks_gallery_equals_sorting(dtypes: tuple[torch.dtype, torch.dtype], classes: int) -> None:
    x, labels = torch.randn(40, 5), torch.randint(0, classes, (40,))
    check_asymmetric(x.to(dtypes[0]), (x + 0.7 * torch.randn(40, 5)).to(dtypes[1]), labels)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("radius", [1e-2, 1e-3, 3e-4, 1e-5])
def test_close_clusters_far_from_the_origin_in_another_networks_gallery(radius: float) -> None:
    center = torch.randn(1, 32)
    rows = torch.cat([center, -center]).repeat_interleave(20, dim=0) + radius * torch.randn(40, 32)
    gallery, labels = rows.repeat(2, 1), torch.arange(40).repeat(2)
    gallery = gallery + 0.1 * radius * torch.randn(80, 32)
    queries = gallery + 0.1 * radius * torch.randn(80, 32)
    assert slow_asymmetric(queries, gallery, labels, 1) == 1.0
    check_asymmetric(queries, gallery, labels)
    check_asymmetric(40 + 1e-2 * queries, 40 + 1e-2 * gallery, labels)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("points", [1, 2, 4])
def test_ties_in_another_networks_gallery_count_against_the_query(points: int) -> None:
    gallery, labels = torch.randn(points, 8)[torch.arange(60) % points], torch.arange(60) * 7 // 60
    for order in (torch.arange(60), torch.arange(60).flip(0), torch.randperm(60)):
        check_asymmetric(torch.randn(60, 8), gallery[order], labels[order])
    collapsed = torch.ones(6, 3), torch.tensor([0, 0, 1, 1, 2, 2])
    assert asymmetric_recall_at_k(torch.randn(6, 3), *collapsed, (1, 4, 5)) == {1: 0.0, 4: 0.0, 5: 1.0}


def test_the_own_image_is_no_neighbor_in_another_networks_gallery() -> None:
    x, labels = torch.tensor([[0.0], [5.0], [0.1], [5.1]]), torch.tensor([0, 0, 1, 1])
    assert asymmetric_recall_at_k(x, x, labels, (1, 2)) == {1: 0.0, 2: 0.5}
    # each image lies where the other one of its class is asked for
    assert asymmetric_recall_at_k(x, x[[1, 0, 3, 2]], labels, (1,)) == {1: 1.0}
    assert asymmetric_recall_at_k(x, x, torch.arange(4), (1,)) == {1: 0.0}


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("shortlist", [1, 3, 100])
def test_a_shortlist_is_ordered_anew(shortlist: int) -> None:
    labels = torch.arange(60) % 9
    gallery = torch.randn(9, 6)[labels] + torch.randn(60, 6)
    pair = gallery + 0.3 * torch.randn(60, 6), gallery
    codes = pair[0][:, :2], pair[1][:, :2]
    expected = {k: slow_rescored(pair, codes, labels, k, shortlist) for k in (1, 2, 5)}
    found = rescored_recall_at_k(*pair, *codes, labels, (1, 2, 5), shortlist)
    assert found == pytest.approx(expected, rel=1e-12)
    if shortlist == 100:  # of everything
        assert found == asymmetric_recall_at_k(*pair, labels, (1, 2, 5))


def test_ties_of_a_shortlist_count_against_the_query() -> None:
    """All codes are one: the shortlist holds negatives, of which there are 8, and what room is left positives."""
    x, labels, same = torch.arange(10.0)[:, None] // 2, torch.arange(10) // 2, torch.zeros(10, 1)
    found = {n: rescored_recall_at_k(x, x, same, same, labels, (1,), n)[1] for n in (8, 9)}
    assert found == {8: 0.0, 9: 1.0}
    assert rescored_recall_at_k(same, same, x, x, labels, (1, 9), 9) == {1: 0.0, 9: 1.0}  # and ties in the end


@pytest.mark.parametrize(("n", "each"), [(1500, 4), (700, 700)])
def test_never_holds_a_full_distance_matrix(n: int, each: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (metrics, retrieval):
        monkeypatch.setattr(module, "BLOCK_ELEMENTS", 50 * 1500)
    with LargestTensor() as largest:
        x, labels = torch.randn(n, 8), torch.arange(n) // each
        recall_at_k(x, labels, (1,)), r_precision(x, labels), map_at_r(x, labels), agreement(x, 2 * x)
        asymmetric_recall_at_k(x, x, labels, (1,)), rescored_recall_at_k(x, x, x, x, labels, (1,))
    assert n * 8 < largest.elements <= 1 << 18  # the pairs that are subtracted at once are the largest


def test_squares_that_no_float_holds() -> None:
    check(torch.randn(60, 8) * 1e25, torch.arange(60) // 3)


def test_embeddings_in_a_mapped_file_are_never_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (metrics, retrieval):
        monkeypatch.setattr(module, "BLOCK_ELEMENTS", 1 << 14)
    x, labels = torch.randn(1500, 600), torch.arange(1500) // 3
    expected = recall_at_k(x, labels), at_r(x, labels)
    np.save(tmp_path / "x.npy", x.numpy())
    mapped = torch.from_numpy(np.load(tmp_path / "x.npy", mmap_mode="c"))
    with LargestTensor() as largest:
        assert (recall_at_k(mapped, labels), at_r(mapped, labels)) == expected
    assert largest.elements <= x.numel() / 3  # of the pairs that are subtracted at once


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
    with pytest.raises(ValueError, match=r"need|at least 1"):
        asymmetric_recall_at_k(embeddings, embeddings, labels, ks)
    with pytest.raises(ValueError, match="equal N and D"):
        asymmetric_recall_at_k(torch.ones(3, 2), torch.ones(3, 1), torch.zeros(3))
    if ks != (0,):
        for metric in (r_precision, map_at_r):
            with pytest.raises(ValueError, match="need"):
                metric(embeddings, labels)


@pytest.mark.cuda
def test_a_gpu_finds_the_same_neighbors_whatever_the_networks_run_in() -> None:
    backends: Any = torch.backends
    x, labels = torch.randn(500, 64) + 3, torch.randint(0, 40, (500,))
    backends.cuda.matmul.fp32_precision = "tf32"
    try:
        found = recall_at_k(x.cuda(), labels.cuda(), (1, 2, 4)), map_at_r(x.cuda(), labels.cuda())
        assert backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        backends.cuda.matmul.fp32_precision = "none"
    assert found[0] == recall_at_k(x, labels, (1, 2, 4))
    assert found[1] == pytest.approx(map_at_r(x, labels))


def slow_agreement(student: Tensor, teacher: Tensor, k: int) -> dict[str, float]:
    """Image by image, from distances of pairs; a neighbor counts where fewer than K others are as near."""

    def near(queries: Tensor, gallery: Tensor, i: int, k: int) -> set[int]:
        others = [j for j in range(len(gallery)) if j != i]
        d = {j: float((queries[i].double() - gallery[j].double()).square().sum()) for j in others}
        return {j for j in others if sum(d[other] <= d[j] for other in others if other != j) < k}

    shares: list[float] = []
    firsts: list[float] = []
    tens: list[float] = []
    for i in range(len(student)):
        theirs = near(teacher, teacher, i, k)
        if theirs:
            shares.append(len(theirs & near(student, student, i, k)) / len(theirs))
        first = near(teacher, teacher, i, 1)
        if first and student.shape == teacher.shape:
            firsts.append(len(first & near(student, teacher, i, 1)))
            tens.append(len(first & near(student, teacher, i, k)))
    named = {f"overlap@{k}": shares}
    if student.shape == teacher.shape:
        named |= {"asymmetric@1": firsts, f"asymmetric@{k}": tens}
    return {name: sum(values) / len(values) if values else 0.0 for name, values in named.items()}


def few_points(n: int, d: int, dtype: torch.dtype, duplicates: bool) -> Tensor:
    """Rows among which, with duplicates, up to a dozen are the same and many distances are equal."""
    return (torch.randint(0, 3, (n, d)) if duplicates else torch.randn(n, d)).to(dtype)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("duplicates", [False, True])
@pytest.mark.parametrize(("n", "ds", "dt", "k"), [(40, 3, 5, 10), (40, 4, 4, 10), (60, 2, 2, 3), (40, 4, 4, 1)])
def test_agreement_is_that_of_a_loop(n: int, ds: int, dt: int, k: int, duplicates: bool, dtype: torch.dtype) -> None:
    student, teacher = few_points(n, ds, dtype, duplicates), few_points(n, dt, dtype, duplicates)
    if ds == dt:
        student[: n // 2] = teacher[: n // 2]  # something to agree on
    found = agreement(student, teacher, k)
    assert found == pytest.approx(slow_agreement(student, teacher, k), abs=1e-12)
    order = torch.randperm(n)
    assert agreement(student[order], teacher[order], k) == pytest.approx(found, abs=1e-12)


def test_a_network_agrees_with_itself_whatever_its_duplicates() -> None:
    x = torch.cat([torch.randn(30, 8).repeat_interleave(2, dim=0), torch.zeros(13, 8)])
    assert agreement(x, x)["overlap@10"] == 1
    plain = torch.randn(50, 8)
    assert agreement(plain, plain) == {"overlap@10": 1, "asymmetric@1": 1, "asymmetric@10": 1}
    assert agreement(plain, torch.nn.functional.pad(3 * plain, (0, 2))) == {"overlap@10": 1}


def test_a_collapsed_network_agrees_with_nothing() -> None:
    point, x = torch.ones(30, 4), torch.randn(30, 4)
    assert agreement(point, x)["overlap@10"] == agreement(x, point)["overlap@10"] == 0
    assert agreement(point, point) == {"overlap@10": 0, "asymmetric@1": 0, "asymmetric@10": 0}


@pytest.mark.parametrize(("n", "expected"), [(1, 0.0), (2, 1.0), (5, 1.0), (11, 1.0)])
def test_among_eleven_images_all_others_are_anybodys_ten_nearest(n: int, expected: float) -> None:
    found = agreement(torch.randn(n, 3), torch.randn(n, 3))
    assert (found["overlap@10"], found["asymmetric@10"]) == (expected, expected)
    assert agreement(torch.ones(n, 3), torch.randn(n, 2)) == {"overlap@10": expected}


def test_agreement_worked_out_by_hand() -> None:
    """The rows' nearest in the teacher's space: 1, 0, 1, 2; in the student's: 2, 2, open between 0 and 1, 1.

    The student's rows among the teacher's find 1, 2, 1, 2: all but the second what the teacher finds.
    """
    teacher, student = torch.tensor([[0.0], [1.0], [3.0], [7.0]]), torch.tensor([[0.0], [3.0], [1.5], [7.0]])
    assert agreement(student, teacher, 1) == {"overlap@1": 0.0, "asymmetric@1": 0.75}


@pytest.mark.parametrize(
    ("student", "teacher", "k"),
    [
        (torch.zeros(0, 3), torch.zeros(0, 3), 1),
        (torch.ones(3, 2), torch.ones(4, 2), 1),
        (torch.ones(3), torch.ones(3), 1),
        (torch.ones(3, 2), torch.ones(3, 2), 0),
        (torch.full((3, 2), math.nan), torch.ones(3, 2), 1),
        (torch.ones(3, 2), torch.full((3, 2), math.inf), 1),
        (torch.full((1, 2), math.nan), torch.ones(1, 2), 1),
    ],
)
def test_refuses_what_cannot_agree(student: Tensor, teacher: Tensor, k: int) -> None:
    with pytest.raises(ValueError, match=r"need|at least 1|not finite"):
        agreement(student, teacher, k)


def test_the_bootstrap_interval_is_that_of_a_slow_loop() -> None:
    """Classes drawn one resample at a time; the recall of each model over all queries of the drawn classes."""
    rng = np.random.default_rng(5)
    labels = np.repeat(np.arange(12), rng.integers(2, 9, 12))
    first, second = rng.random((2, len(labels))) < [[0.8], [0.6]]
    draws, gains = np.random.default_rng(3), []
    for _ in range(400):
        rows = np.concatenate([np.flatnonzero(labels == drawn) for drawn in draws.integers(0, 12, 12)])
        gains.append(first[rows].mean() - second[rows].mean())
    ours, theirs, classes = torch.from_numpy(first), torch.from_numpy(second), torch.from_numpy(labels)
    found = paired_bootstrap(ours, theirs, classes, resamples=400, seed=3)
    assert found.difference == pytest.approx(first.mean() - second.mean())
    assert [found.low, found.high] == pytest.approx(np.percentile(gains, [2.5, 97.5]), abs=1e-12)
    assert (found.classes, found.is_clear) == (12, found.low > 0)
    again = paired_bootstrap(ours, theirs, classes, resamples=400, seed=3)
    other = paired_bootstrap(ours, theirs, classes, resamples=400, seed=4)
    assert found == again != other
    same = paired_bootstrap(ours, ours, classes, resamples=400)
    assert (same.difference, same.low, same.high, same.is_clear) == (0, 0, 0, False)
    with pytest.raises(ValueError, match="two classes"):
        paired_bootstrap(torch.ones(3), torch.ones(3), torch.zeros(3, dtype=torch.int64))


def test_arrays_lists_and_one_k_are_taken() -> None:
    x, labels = torch.randn(30, 4), torch.arange(30) % 7
    texts = [f"class {label}" for label in labels.tolist()]
    due = recall_at_k(x, labels, (1, 4))
    assert recall_at_k(x, labels, 4) == {4: due[4]}
    for given in (labels.numpy(), labels.tolist(), texts, np.array(texts)):
        assert recall_at_k(x.numpy(), given, (1, 4)) == due
        assert recall_at_k(x.tolist(), given, [1, 4]) == due
        assert asymmetric_recall_at_k(x.numpy(), x.numpy(), given, 1) == {1: due[1]}
        assert (r_precision(x.numpy(), given), map_at_r(x.numpy(), given)) == at_r(x, labels)
    with pytest.raises(ValueError, match="K must be at least 1"):
        recall_at_k(x, labels, 0)
