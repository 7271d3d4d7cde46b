"""Retrieval metrics, block by block: no N x N matrix ever exists.

In all of them every row is once the query and all other rows are the gallery; distance is Euclidean. With labels, a
query without a positive has nothing to find: it is left out of the mean, and ``without_positive`` counts such queries.
A negative as near as a positive comes before it, so embeddings that have collapsed into one point find nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import isqrt
from typing import NamedTuple

import torch
from torch import Tensor

from rkd_cli.geometry import check_rows, exact_products, squared_differences
from rkd_cli.retrieval import BLOCK_ELEMENTS, finite_in_range, nearest, rounding, underflow
from rkd_cli.runtime.distributed import ALONE, Ranks

_ROWS = 256  # whose classes lie beside each other, of a tile of positives


@torch.no_grad()
def recall_at_k(
    embeddings: Tensor, labels: Tensor, ks: Sequence[int] = (1, 2, 4, 8), ranks: Ranks = ALONE
) -> dict[int, float]:
    """Recall@K (Oh Song et al., CVPR 2016): the share of queries that have a positive among their K neighbors.

    A query is a hit at K when fewer than K negatives are as near as its nearest positive. Where rounding could decide
    that, the query is looked up again, exactly.

    Args:
        embeddings: (N, D), any floating type.
        labels: (N,) integers, on the same device.
        ks: the values of K, each at least 1.
        ranks: who each have all of the embeddings, and share the queries.
    Returns:
        {k: fraction of queries that are hits}, 0 where no query has a positive.
    Raises:
        ValueError: no rows, shapes that do not match, values that are not finite, or a K below 1.
    """
    if min(ks) < 1:
        raise ValueError(f"K must be at least 1, got {list(ks)}")
    embeddings = _checked(embeddings, labels=labels)[0]
    n, side = len(labels), isqrt(BLOCK_ELEMENTS)
    order = labels.argsort()  # so that the positives of neighboring queries are neighboring columns
    y, work = labels[order], torch.promote_types(embeddings.dtype, torch.float32)
    mean = embeddings.mean(dim=0, dtype=work)  # about which products lose the fewest digits
    _, classes, counts = torch.unique_consecutive(y, return_inverse=True, return_counts=True)
    ends, high = counts.cumsum(dim=0), min(_ROWS, side)
    low = _tiles(0, n, high)
    edges = classes[[rows.start for rows in low]], classes[[rows.stop - 1 for rows in low]]
    # where the classes of some rows begin and end; a sync
    reach = torch.stack([(ends - counts)[edges[0]], ends[edges[1]]], dim=1).tolist()

    def part(rows: slice) -> Tensor:  # a copy: as large as a tile, where all rows would be as large as the embeddings
        return embeddings[order[rows]].to(work) - mean

    def distances(x: Tensor, rows: slice, columns: slice) -> Tensor:  # squared
        return torch.addmm(norms[columns], x, part(columns).T, alpha=-2).add_(norms[rows, None])

    norms = torch.cat([part(rows).square().sum(dim=1) for rows in low])
    closest = torch.zeros_like(norms)  # of the positives
    with exact_products(embeddings.device):
        for rows, (first, last) in [*zip(low, reach, strict=True)][ranks.rank :: ranks.size]:
            x, closest[rows] = part(rows), torch.inf
            for columns in _tiles(first, last, BLOCK_ELEMENTS // high):
                positives = y[rows, None] == y[columns]
                positives.diagonal(rows.start - columns.start).fill_(False)  # the query itself
                nearest_here = distances(x, rows, columns).masked_fill_(~positives, torch.inf).amin(dim=1)
                closest[rows] = closest[rows].minimum(nearest_here)
        closest = ranks.sum(closest)  # a row is another's, or 0
        # both of the distances that are compared may be off
        error = 6 * rounding(mean[None]) * (norms + closest) + underflow(mean[None])
        limits = torch.stack([closest - error, closest + error])  # (2, N)

        nearer = torch.zeros_like(limits)  # negatives within them; distances are symmetric, each tile serves twice
        blocks = _tiles(0, n, side)
        for i, rows in enumerate(blocks):
            x, (_, last) = part(rows), reach[(rows.stop - 1) // high]
            for columns in blocks[i + (ranks.rank - i) % ranks.size :: ranks.size]:
                d = distances(x, rows, columns)
                if columns.start < last:
                    d.masked_fill_(y[rows, None] == y[columns], torch.inf)
                within = torch.empty_like(d)  # as floats, which add up many times faster than bools
                for count, limit in zip(nearer, limits, strict=True):
                    count[rows] += torch.le(d, limit[rows, None], out=within).sum(dim=1)
                    if rows != columns:
                        count[columns] += torch.le(d, limit[columns], out=within).sum(dim=0)

    nearer = ranks.sum(nearer)
    back = order.argsort()
    perhaps, hits = (nearer[:, back, None] < torch.tensor(ks, device=y.device)).unbind()  # (N, len(ks))
    queries = (counts > 1)[classes][back]
    lost = ~limits.isfinite().all(dim=0)[back]  # squares beyond the largest number
    doubtful = (((perhaps != hits).any(dim=1) | lost) & queries).nonzero()[:, 0]  # a sync
    for matches, _, asked in _ranked(embeddings, embeddings, labels, doubtful, max(ks)):
        hits[asked] = torch.stack([matches[:, :k].any(dim=1) for k in ks], dim=1)
    shares = hits[queries].double().mean(dim=0).nan_to_num(0.0)  # no queries have no mean
    return dict(zip(ks, shares.tolist(), strict=True))


@torch.no_grad()
def asymmetric_recall_at_k(
    queries: Tensor, gallery: Tensor, labels: Tensor, ks: Sequence[int] = (1, 2, 4, 8)
) -> dict[int, float]:
    """Recall@K of queries by one network in the gallery of another, the query's own image left out.

    A hit is what ``recall_at_k`` calls one, and equal queries and gallery give its figures; but each query's neighbors
    are sorted, K and as many as its class has, which takes longer.

    Args:
        queries: (N, D), any floating type.
        gallery: (N, D), row i of the same image as row i of ``queries``, on the same device.
        labels: (N,) integers, likewise.
        ks: the values of K, each at least 1.
    Returns:
        {k: fraction of queries that are hits}, 0 where no query has a positive.
    Raises:
        ValueError: no rows, shapes that do not match, values that are not finite, or a K below 1.
    """
    return _shares(
        [
            torch.stack([matches[:, :k].any(dim=1) for k in ks], dim=1)
            for matches, *_ in _ranked_all(queries, gallery, labels, ks, max(ks))
        ],
        ks,
    )


@torch.no_grad()
def rescored_recall_at_k(
    queries: Tensor,
    gallery: Tensor,
    query_codes: Tensor,
    gallery_codes: Tensor,
    labels: Tensor,
    ks: Sequence[int] = (1, 2, 4, 8),
    shortlist: int = 10,
) -> dict[int, float]:
    """Asymmetric Recall@K of a search in two steps: codes pick ``shortlist`` x K images, vectors order them anew.

    Each K is a search of its own. At one distance negatives come first, by their codes and in the end; which of the
    negatives at the last distance of a shortlist are on it is open.

    Args:
        queries: (N, D), any floating type.
        gallery: (N, D), row i of the same image as row i of ``queries``, on the same device.
        query_codes: (N, C), what the first step compares, by Euclidean distance.
        gallery_codes: (N, C).
        labels: (N,) integers.
        ks: the values of K, each at least 1.
        shortlist: images looked at again, for each of K.
    Returns:
        {k: fraction of queries that are hits}, 0 where no query has a positive.
    Raises:
        ValueError: no rows, shapes that do not match, values that are not finite, or a K below 1.
    """
    queries, gallery = _checked(queries, gallery, labels=labels)
    parts = []
    for matches, rows, part in _ranked_all(query_codes, gallery_codes, labels, ks, shortlist * max(ks)):
        asked = part.repeat_interleave(rows.shape[1])
        squared = squared_differences(queries, gallery, asked, rows.flatten()).view(rows.shape)
        hits = []
        for k in ks:
            near, positive = squared[:, : shortlist * k], matches[:, : shortlist * k]
            closest = near.masked_fill(~positive, torch.inf).amin(dim=1, keepdim=True)
            before = ((near <= closest) & ~positive).sum(dim=1)  # all of them where none is a positive
            hits.append(before < k)
        parts.append(torch.stack(hits, dim=1))
    return _shares(parts, ks)


@torch.no_grad()
def r_precision(embeddings: Tensor, labels: Tensor) -> float:
    """R-Precision (Musgrave et al., ECCV 2020, section 3.2): the share of positives among a query's R neighbors.

    R is the query's own number of positives.

    Args:
        embeddings: (N, D), any floating type.
        labels: (N,) integers, on the same device.
    Returns:
        The mean over queries, 0 where no query has a positive.
    Raises:
        ValueError: no rows, shapes that do not match, or values that are not finite.
    """
    return at_r(embeddings, labels).r_precision


@torch.no_grad()
def map_at_r(embeddings: Tensor, labels: Tensor) -> float:
    """MAP@R (Musgrave et al., ECCV 2020, equation 1): average precision over a query's R neighbors.

    1/R sum_i P(i), where P(i) is the precision among the i nearest if the i-th is a positive, else 0.

    Args:
        embeddings: (N, D), any floating type.
        labels: (N,) integers, on the same device.
    Returns:
        The mean over queries, 0 where no query has a positive.
    Raises:
        ValueError: no rows, shapes that do not match, or values that are not finite.
    """
    return at_r(embeddings, labels).map_at_r


class AtR(NamedTuple):
    """Both metrics of a query's R neighbors."""

    r_precision: float
    map_at_r: float


@torch.no_grad()
def at_r(embeddings: Tensor, labels: Tensor, ranks: Ranks = ALONE) -> AtR:
    """``r_precision`` and ``map_at_r``, from one search for neighbors.

    Args:
        embeddings, labels: as theirs.
        ranks: who each have all of the embeddings, and share the queries.
    Raises:
        ValueError: as theirs.
    """
    embeddings = _checked(embeddings, labels=labels)[0]
    r = _positives(labels)
    queries = r.nonzero()[:, 0]  # a sync
    depth = int(r.max())  # a sync
    shares = [torch.empty(0, 2, dtype=torch.float64, device=r.device)]
    for matches, _, part in _ranked(embeddings, embeddings, labels, queries[ranks.share(len(queries))], depth):
        places = torch.arange(1, matches.shape[1] + 1, device=r.device)
        found = (matches & (places <= r[part, None])).double()  # (B, max R) 1 where the i-th neighbor is a positive
        precision = found.cumsum(dim=1) / places
        shares.append(torch.stack([found.sum(dim=1), (precision * found).sum(dim=1)], dim=1) / r[part, None])
    return AtR(*ranks.gather(torch.cat(shares)).mean(dim=0).nan_to_num(0.0).tolist())  # no queries have no mean


@torch.no_grad()
def agreement(student: Tensor, teacher: Tensor, k: int = 10, queries: Tensor | None = None) -> dict[str, float]:
    """How far two networks agree on who is near whom, without labels.

    ``overlap@k`` is the mean share of a row's K nearest in the teacher's space that are among its K nearest in the
    student's. Where both sizes are equal, or ``queries`` are given, ``asymmetric@1`` and ``asymmetric@k`` are the share
    of rows whose nearest in the teacher's space is among the 1 or K teacher rows nearest to the student's row: what a
    student finds that queries the teacher's index. No row is its own neighbor. Neighbors drawn at random overlap by
    K / (N - 1), so with no more than K + 1 rows everything agrees.

    Rows at exactly the distance of the next one after the K are none of the K, whatever their order: those of the
    teacher are left out of the mean, those of the student count against it, and one that has collapsed scores 0.

    Args:
        student: (N, Ds), any floating type.
        teacher: (N, Dt) of the same images, on the same device.
        k: at least 1.
        queries: (N, Dt) the student's rows in the teacher's space, where they are not its embeddings.
    Returns:
        Fractions by name, 0 where the teacher has no nearest rows.
    Raises:
        ValueError: no rows, shapes that do not match, values that are not finite, or a ``k`` below 1.
    """
    check_rows(student, teacher)
    queries = student if queries is None else queries
    for rows in (student, teacher, queries):
        finite_in_range(rows)  # raises; ``nearest`` scales the rows of a space together
    if k < 1:
        raise ValueError(f"K must be at least 1, got {k}")
    alike = queries.shape == teacher.shape
    names = [f"overlap@{k}", *(["asymmetric@1", f"asymmetric@{k}"] if alike else [])]
    if len(student) == 1:
        return dict.fromkeys(names, 0.0)
    own = torch.arange(len(student), device=student.device)
    theirs = nearest(teacher, teacher, k + 1, own)
    shares = [_share(nearest(student, student, k + 1, own), k, theirs, k)]
    if alike:
        ours = nearest(queries, teacher, k + 1, own)
        shares += [_share(ours, 1, theirs, 1), _share(ours, k, theirs, 1)]
    return dict(zip(names, shares, strict=True))


def _share(ours: tuple[Tensor, Tensor], k: int, theirs: tuple[Tensor, Tensor], of: int) -> float:
    """The mean share of the first ``of`` neighbors of theirs, of those that are certain, among the first K of ours."""
    mine, wanted = _certain(*ours, k, -1), _certain(*theirs, of, -2)
    found = torch.stack([(mine == column[:, None]).any(dim=1) for column in wanted.unbind(dim=1)]).sum(dim=0)
    known = (wanted >= 0).sum(dim=1)
    return float((found.double() / known)[known > 0].mean().nan_to_num(0.0))


def _certain(distances: Tensor, rows: Tensor, k: int, blank: int) -> Tensor:
    """(N, K) the nearest rows; blank where the one after them is as near."""
    return rows[:, :k].masked_fill(distances[:, :k] == distances[:, k : k + 1], blank) if rows.shape[1] > k else rows


def without_positive(labels: Tensor) -> int:
    """How many rows are alone in their class, so that every metric here leaves them out.

    Args:
        labels: (N,) integers.
    Raises:
        ValueError: another shape.
    """
    if labels.ndim != 1:
        raise ValueError(f"need (N,) labels, got {tuple(labels.shape)}")
    return int((_positives(labels) == 0).sum())


def _positives(labels: Tensor) -> Tensor:
    """(N,) how many positives each row has."""
    _, classes, counts = torch.unique(labels, return_inverse=True, return_counts=True)
    positives: Tensor = counts[classes] - 1
    return positives


def _tiles(start: int, stop: int, size: int) -> list[slice]:
    return [slice(first, min(stop, first + size)) for first in range(start, stop, size)]


def _ranked_all(
    queries: Tensor, gallery: Tensor, labels: Tensor, ks: Sequence[int], depth: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """``_ranked`` of all queries that have a positive, looked at first."""
    if min(ks) < 1:
        raise ValueError(f"K must be at least 1, got {list(ks)}")
    queries, gallery = _checked(queries, gallery, labels=labels)
    yield from _ranked(queries, gallery, labels, _positives(labels).nonzero()[:, 0], depth)  # a sync


def _ranked(
    queries: Tensor, gallery: Tensor, labels: Tensor, asked: Tensor, depth: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Some queries at a time: (B, K) whether the i-th neighbor is a positive, right up to ``depth``, (B, K) its row of
    the gallery, and (B,) which queries.

    Neighbors at one distance are taken negatives first. Where they go on past the ``depth`` + R that are looked at, R a
    query's positives, enough negatives are among them to put their positives past ``depth``.
    """
    if len(asked) == 0:
        return
    k = min(len(labels), depth + int(_positives(labels)[asked].max()))  # a sync
    for part in torch.split(asked, max(1, BLOCK_ELEMENTS // max(k, queries.shape[1]))):
        distances, rows = nearest(queries[part], gallery, k, own=part)
        matches = labels[rows] == labels[part, None]  # (B, K)
        order = matches.byte().argsort(dim=1, stable=True)
        order = order.gather(1, distances.gather(1, order).argsort(dim=1, stable=True))[:, :depth]
        yield matches.gather(1, order), rows.gather(1, order), part


def _checked(*rows: Tensor, labels: Tensor) -> list[Tensor]:
    """Embeddings of one space and size, in range."""
    check_rows(*rows, labels=labels, same_size=True)
    return finite_in_range(*rows)[1]


def _shares(hits: list[Tensor], ks: Sequence[int]) -> dict[int, float]:
    """{k: mean} of (B, len(ks)) hits, some queries at a time."""
    shares = torch.cat(hits).double().mean(dim=0).tolist() if hits else [0.0] * len(ks)
    return dict(zip(ks, shares, strict=True))
