"""Retrieval metrics, computed in blocks: memory is far below N x N.

Each row is the query once, against all other rows, unless a ``Protocol`` names queries and gallery; distance is
Euclidean. Queries without a positive are left out of the mean; ``without_positive`` counts them. Ties count as misses,
so collapsed embeddings score 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import isqrt
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rkd_cli.geometry import check_rows, exact_products, squared_differences
from rkd_cli.retrieval import BLOCK_ELEMENTS, finite_in_range, nearest, rounding, underflow
from rkd_cli.runtime.distributed import ALONE, Ranks

_ROWS = 256  # sorted by class, in a tile of positives
Rows = Tensor | np.ndarray | Sequence[Any]


class Protocol(NamedTuple):
    """Queries and gallery among N images. An image of a query's label and camera is no answer; neither is itself."""

    queries: Tensor  # (Q,) rows
    gallery: Tensor  # (M,) rows
    cameras: Tensor | None = None  # (N,) integers


class Retrieval(NamedTuple):
    """Means over the queries with a positive; all 0 if there is none."""

    recall: dict[int, float]  # {k: fraction of queries that are hits}, also called CMC
    r_precision: float
    map_at_r: float
    map: float
    minp: float
    without_positive: int  # queries that are left out


@torch.no_grad()
def recall_at_k(
    embeddings: Rows,
    labels: Rows,
    ks: int | Sequence[int] = (1, 2, 4, 8),
    ranks: Ranks = ALONE,
    protocol: Protocol | None = None,
) -> dict[int, float]:
    """Recall@K (Oh Song et al., CVPR 2016): the fraction of queries with a positive among their K nearest neighbors.

    A query is a hit at K if fewer than K negatives are as near as its nearest positive. Queries for which float32
    rounding could decide are searched again in float64.

    Args:
        embeddings: (N, D), any floating dtype; a tensor or an array.
        labels: (N,) integers or texts, on the same device; a tensor, an array or a list.
        ks: the values of K, each at least 1, or one of them.
        ranks: processes that each have all embeddings and split the queries.
        protocol: queries and gallery; None: each row is a query in all others.
    Returns:
        {k: fraction of queries that are hits}, 0 if no query has a positive.
    Raises:
        ValueError: no rows, shapes that do not match, non-finite values, or a K below 1.
    """
    embeddings, labels = _tensors(embeddings, labels)
    ks = (ks,) if isinstance(ks, int) else ks
    if protocol:
        return protocol_metrics(embeddings, embeddings, labels, protocol, ks, ranks).recall
    hits, queries = hits_at_k(embeddings, labels, ks, ranks)
    fractions = hits[queries].double().mean(dim=0).nan_to_num(0.0)  # NaN without queries
    return dict(zip(ks, fractions.tolist(), strict=True))


@torch.no_grad()
def hits_at_k(
    embeddings: Tensor, labels: Tensor, ks: Sequence[int] = (1, 2, 4, 8), ranks: Ranks = ALONE
) -> tuple[Tensor, Tensor]:
    """The hits that ``recall_at_k`` averages; its arguments and errors.

    Returns:
        (N, len(ks)) bool, whether row i is a hit at K, and (N,) bool, whether it has a positive.
    """
    if min(ks) < 1:
        raise ValueError(f"K must be at least 1, got {list(ks)}")
    embeddings = _checked(embeddings, labels=labels)[0]
    n, side = len(labels), isqrt(BLOCK_ELEMENTS)
    order = labels.argsort()  # so that the positives of a tile of queries are neighboring columns
    y, work = labels[order], torch.promote_types(embeddings.dtype, torch.float32)
    mean = embeddings.mean(dim=0, dtype=work)  # centering costs products the fewest digits
    _, classes, counts = torch.unique_consecutive(y, return_inverse=True, return_counts=True)
    ends, high = counts.cumsum(dim=0), min(_ROWS, side)
    low = _tiles(0, n, high)
    edges = classes[[rows.start for rows in low]], classes[[rows.stop - 1 for rows in low]]
    # first and last column of the classes of each block of rows; a sync
    reach = torch.stack([(ends - counts)[edges[0]], ends[edges[1]]], dim=1).tolist()

    def part(rows: slice) -> Tensor:  # a copy of one tile, not of all embeddings
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
        closest = ranks.sum(closest)  # every row is nonzero in one process only
        # both compared distances have this error
        error = 6 * rounding(mean[None]) * (norms + closest) + underflow(mean[None])
        limits = torch.stack([closest - error, closest + error])  # (2, N)

        nearer = torch.zeros_like(limits)  # negatives within limits; distances are symmetric, so a tile is used twice
        blocks = _tiles(0, n, side)
        for i, rows in enumerate(blocks):
            x, (_, last) = part(rows), reach[(rows.stop - 1) // high]
            for columns in blocks[i + (ranks.rank - i) % ranks.size :: ranks.size]:
                d = distances(x, rows, columns)
                if columns.start < last:
                    d.masked_fill_(y[rows, None] == y[columns], torch.inf)
                within = torch.empty_like(d)  # floats sum many times faster than bools
                for count, limit in zip(nearer, limits, strict=True):
                    count[rows] += torch.le(d, limit[rows, None], out=within).sum(dim=1)
                    if rows != columns:
                        count[columns] += torch.le(d, limit[columns], out=within).sum(dim=0)

    nearer = ranks.sum(nearer)
    back = order.argsort()
    perhaps, hits = (nearer[:, back, None] < torch.tensor(ks, device=y.device)).unbind()  # (N, len(ks))
    queries = (counts > 1)[classes][back]
    lost = ~limits.isfinite().all(dim=0)[back]  # squares that overflowed
    doubtful = (((perhaps != hits).any(dim=1) | lost) & queries).nonzero()[:, 0]  # a sync
    for matches, _, asked in _ranked(embeddings, embeddings, labels, doubtful, max(ks)):
        hits[asked] = torch.stack([matches[:, :k].any(dim=1) for k in ks], dim=1)
    return hits, queries


class Interval(NamedTuple):
    """A difference of recalls, as a fraction, and its 95 % interval."""

    difference: float
    low: float
    high: float
    classes: int  # that were resampled

    @property
    def is_clear(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0


def paired_bootstrap(first: Tensor, second: Tensor, labels: Tensor, resamples: int = 10_000, seed: int = 1) -> Interval:
    """Recall of one model minus that of another, with a percentile interval by a paired bootstrap over classes.

    A resample draws as many classes as there are, with replacement; its figure is the difference over all queries of
    the drawn classes. The networks and the gallery stay as they are: the interval covers the choice of the classes, not
    the seeds of the trainings.

    Args:
        first, second: (N,) bool, whether each query is a hit.
        labels: (N,) integers, the queries' classes.
        resamples: number of resamples.
        seed: of the draws.
    Raises:
        ValueError: fewer than two classes.
    """
    from scipy import stats  # takes half a second

    _, classes, queries = torch.unique(labels, return_inverse=True, return_counts=True)
    if len(queries) < 2:
        raise ValueError("need queries of two classes")
    gains = torch.zeros(len(queries), dtype=torch.float64, device=labels.device)
    gains.index_add_(0, classes, first.double() - second.double())

    def difference(gains: Any, queries: Any, axis: int) -> Any:
        return gains.sum(axis) / queries.sum(axis)

    found = stats.bootstrap(
        (gains.cpu().numpy(), queries.cpu().numpy()),
        difference,
        paired=True,
        n_resamples=resamples,
        batch=max(1, BLOCK_ELEMENTS // len(queries)),
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(float(gains.sum() / queries.sum()), float(found.low), float(found.high), len(queries))


@torch.no_grad()
def asymmetric_recall_at_k(
    queries: Rows,
    gallery: Rows,
    labels: Rows,
    ks: int | Sequence[int] = (1, 2, 4, 8),
    protocol: Protocol | None = None,
) -> dict[int, float]:
    """Recall@K of one network's queries in another network's gallery, without the query's own image.

    Equal queries and gallery give the results of ``recall_at_k``, but slower: neighbors are sorted.

    Args:
        queries: (N, D), any floating dtype.
        gallery: (N, D), row i of the same image as row i of ``queries``, on the same device.
        labels: (N,) integers, on the same device.
        ks: the values of K, each at least 1.
        protocol: which rows are used of ``queries`` and of ``gallery``; None: all.
    Returns:
        {k: fraction of queries that are hits}, 0 if no query has a positive.
    Raises:
        ValueError: no rows, shapes that do not match, non-finite values, or a K below 1.
    """
    queries, gallery, labels = _tensors(queries, gallery, labels)
    ks = (ks,) if isinstance(ks, int) else ks
    if protocol:
        return protocol_metrics(queries, gallery, labels, protocol, ks).recall
    return _fractions(
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
    """Asymmetric Recall@K of a two-step search: codes pick ``shortlist`` x K images, embeddings rerank them.

    Each K is a separate search. In both steps ties count as misses. If several negatives tie for the end of the
    shortlist, which of them are on it is undefined.

    Args:
        queries: (N, D), any floating dtype.
        gallery: (N, D), row i of the same image as row i of ``queries``, on the same device.
        query_codes: (N, C), compared in the first step by Euclidean distance.
        gallery_codes: (N, C).
        labels: (N,) integers.
        ks: the values of K, each at least 1.
        shortlist: number of images to rerank, per K.
    Returns:
        {k: fraction of queries that are hits}, 0 if no query has a positive.
    Raises:
        ValueError: no rows, shapes that do not match, non-finite values, or a K below 1.
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
            before = ((near <= closest) & ~positive).sum(dim=1)  # all, if none is a positive
            hits.append(before < k)
        parts.append(torch.stack(hits, dim=1))
    return _fractions(parts, ks)


@torch.no_grad()
def r_precision(embeddings: Rows, labels: Rows) -> float:
    """R-Precision (Musgrave et al., ECCV 2020, section 3.2): the fraction of positives among a query's R neighbors.

    R is the query's number of positives.

    Args:
        embeddings: (N, D), any floating dtype.
        labels: (N,) integers, on the same device.
    Returns:
        The mean over queries, 0 if no query has a positive.
    Raises:
        ValueError: no rows, shapes that do not match, or non-finite values.
    """
    return at_r(embeddings, labels).r_precision


@torch.no_grad()
def map_at_r(embeddings: Rows, labels: Rows) -> float:
    """MAP@R (Musgrave et al., ECCV 2020, equation 1): average precision over a query's R neighbors.

    1/R sum_i P(i), where P(i) is the precision among the i nearest if the i-th is a positive, else 0.

    Args:
        embeddings: (N, D), any floating dtype.
        labels: (N,) integers, on the same device.
    Returns:
        The mean over queries, 0 if no query has a positive.
    Raises:
        ValueError: no rows, shapes that do not match, or non-finite values.
    """
    return at_r(embeddings, labels).map_at_r


class AtR(NamedTuple):
    """The metrics over R neighbors."""

    r_precision: float
    map_at_r: float


@torch.no_grad()
def at_r(embeddings: Rows, labels: Rows, ranks: Ranks = ALONE) -> AtR:
    """``r_precision`` and ``map_at_r`` from one search.

    Args:
        embeddings: (N, D), any floating dtype.
        labels: (N,) integers, on the same device.
        ranks: processes that each have all embeddings and split the queries.
    Raises:
        ValueError: no rows, shapes that do not match, or non-finite values.
    """
    embeddings, labels = _tensors(embeddings, labels)
    embeddings = _checked(embeddings, labels=labels)[0]
    r = _positives(labels)
    queries = r.nonzero()[:, 0]  # a sync
    depth = int(r.max())  # a sync
    results = [torch.empty(0, 2, dtype=torch.float64, device=r.device)]
    for matches, _, part in _ranked(embeddings, embeddings, labels, queries[ranks.own_rows(len(queries))], depth):
        places = torch.arange(1, matches.shape[1] + 1, device=r.device)
        found = (matches & (places <= r[part, None])).double()  # (B, max R) 1 where the i-th neighbor is a positive
        precision = found.cumsum(dim=1) / places
        results.append(torch.stack([found.sum(dim=1), (precision * found).sum(dim=1)], dim=1) / r[part, None])
    return AtR(*ranks.gather(torch.cat(results)).mean(dim=0).nan_to_num(0.0).tolist())  # NaN without queries


def protocol_metrics(
    queries: Tensor,
    gallery: Tensor,
    labels: Tensor,
    protocol: Protocol,
    ks: Sequence[int] = (1, 2, 4, 8),
    ranks: Ranks = ALONE,
) -> Retrieval:
    """``retrieval_metrics`` of the queries and the gallery of ``protocol``.

    Args:
        queries: (N, D), of which the protocol's queries are used.
        gallery: (N, D), row i of the same image as row i of ``queries``; the same tensor for one network.
        labels: (N,) integers, on the same device.
        protocol: of the N images.
        ks: the values of K, each at least 1.
        ranks: processes that each have all embeddings and split the queries.
    Raises:
        ValueError: as ``retrieval_metrics``.
    """
    check_rows(queries, gallery, labels=labels, same_size=True)
    asked, answers = (rows.to(labels.device) for rows in protocol[:2])
    if not len(asked) or not len(answers):
        return Retrieval(dict.fromkeys(ks, 0.0), 0.0, 0.0, 0.0, 0.0, len(asked))
    own = torch.full_like(labels, -1)
    own[answers] = torch.arange(len(answers), device=labels.device)
    cameras = None if protocol.cameras is None else protocol.cameras.to(labels.device)
    pair = None if cameras is None else (cameras[asked], cameras[answers])
    found = queries[asked], gallery[answers], labels[asked], labels[answers]
    return retrieval_metrics(*found, ks, pair, own[asked], ranks)


@torch.no_grad()
def retrieval_metrics(
    queries: Tensor,
    gallery: Tensor,
    query_labels: Tensor,
    gallery_labels: Tensor,
    ks: Sequence[int] = (1, 2, 4, 8),
    cameras: tuple[Tensor, Tensor] | None = None,
    own: Tensor | None = None,
    ranks: Ranks = ALONE,
) -> Retrieval:
    """Recall@K, R-Precision, MAP@R, mAP and mINP of queries in a gallery, by the rule of Market-1501.

    A positive has the query's label. With ``cameras`` (Zheng et al., ICCV 2015), gallery images of the query's label
    and camera are left out. With the rank r_i of the i-th of R positives, Recall@K is the mean of [r_1 <= K], mAP of
    1/R sum_i i/r_i, mINP (Ye et al., TPAMI 2021) of R/r_R, R-Precision and MAP@R as in ``at_r``. mAP is not
    interpolated. Float32 products rank what rounding cannot decide; the rest is subtracted in float64.

    Args:
        queries: (Q, D), any floating dtype.
        gallery: (M, D), on the same device, like all that follows.
        query_labels: (Q,) integers.
        gallery_labels: (M,) integers; a label of no query is a distractor.
        ks: the values of K, each at least 1.
        cameras: (Q,) and (M,) integers.
        own: (Q,) the gallery row of each query itself, which is left out; negative if it has none.
        ranks: processes that each have all embeddings and split the queries.
    Raises:
        ValueError: no rows, shapes that do not match, non-finite values, or a K below 1.
    """
    if min(ks) < 1:
        raise ValueError(f"K must be at least 1, got {list(ks)}")
    check_rows(queries, labels=query_labels)
    check_rows(gallery, labels=gallery_labels)
    if queries.shape[1] != gallery.shape[1]:
        raise ValueError(f"queries have {queries.shape[1]} dimensions, and the gallery has {gallery.shape[1]}")
    _, (queries, gallery) = finite_in_range(queries, gallery)
    order = gallery_labels.argsort()
    y = gallery_labels[order]
    first, last = torch.searchsorted(y, query_labels), torch.searchsorted(y, query_labels, right=True)
    most = int((last - first).amax())  # a sync
    asked = torch.arange(len(queries), device=y.device)[ranks.own_rows(len(queries))]
    parts = [queries.new_empty(0, len(ks) + 4, dtype=torch.float64)]
    for block in torch.split(asked, max(1, BLOCK_ELEMENTS // max(len(gallery), queries.shape[1]))) if most else ():
        places = first[block, None] + torch.arange(most, device=y.device)
        rows, counted = order[places.clamp(max=len(order) - 1)], places < last[block, None]  # (B, most)
        if cameras:
            counted &= cameras[1][rows] != cameras[0][block, None]
        if own is not None:
            counted &= rows != own[block, None]
        found = _ranks(queries, gallery, (query_labels, gallery_labels), block, rows, counted)
        parts.append(_per_query(found, ks)[counted.any(dim=1)])
    figures = ranks.gather(torch.cat(parts))
    means = figures.mean(dim=0).nan_to_num(0.0).tolist()  # NaN without queries
    r, map_r, mean_ap, minp = means[len(ks) :]
    return Retrieval(dict(zip(ks, means, strict=False)), r, map_r, mean_ap, minp, len(queries) - len(figures))


def _ranks(
    queries: Tensor, gallery: Tensor, labels: tuple[Tensor, Tensor], block: Tensor, rows: Tensor, counted: Tensor
) -> Tensor:
    """(B, R) ascending ranks of each query's positives, the gallery's ``rows`` that are ``counted``; infinite beyond.

    Gallery rows of other labels are ranked before positives at the same distance.
    """
    i, j = counted.nonzero(as_tuple=True)  # a sync
    positives = torch.full(rows.shape, torch.inf, dtype=torch.float64, device=rows.device)  # squared distances
    positives[i, j] = squared_differences(queries, gallery, block[i], rows[i, j])
    positives = positives.sort(dim=1).values
    work = torch.promote_types(torch.promote_types(queries.dtype, gallery.dtype), torch.float32)
    mean = gallery.mean(dim=0, dtype=work)  # centering costs products the fewest digits
    x = queries[block].to(work) - mean
    norms = x.square().sum(dim=1, keepdim=True)
    # both compared distances have this error
    error = (6 * rounding(x) * (norms.double() + positives) + underflow(x)).nan_to_num(posinf=0.0)
    nearer = torch.zeros(len(block), rows.shape[1] + 1, dtype=torch.float64, device=rows.device)
    for columns in _tiles(0, len(gallery), BLOCK_ELEMENTS):
        y = gallery[columns].to(work) - mean
        with exact_products(queries.device):
            d = torch.addmm(y.square().sum(dim=1), x, y.T, alpha=-2).add_(norms).double()
        negative = labels[0][block, None] != labels[1][columns]
        place = torch.searchsorted(positives - error, d)  # of the first positive that is not nearer
        doubtful = negative & ((torch.searchsorted(positives + error, d) != place) | ~d.isfinite())
        i, j = doubtful.nonzero(as_tuple=True)  # a sync
        if len(i):
            d[i, j] = squared_differences(queries, gallery, block[i], j + columns.start)
            place = torch.searchsorted(positives, d)
        nearer.scatter_add_(1, place, negative.double())
    ranks = nearer[:, :-1].cumsum(dim=1) + torch.arange(1, nearer.shape[1], device=rows.device)
    return ranks.masked_fill(positives.isinf(), torch.inf)


def _per_query(ranks: Tensor, ks: Sequence[int]) -> Tensor:
    """(B, len(ks) + 4) hits, R-Precision, MAP@R, AP and INP from (B, R) ranks of positives, infinite beyond."""
    there = ranks.isfinite()
    r = there.sum(dim=1, keepdim=True).double()
    precision, within = torch.arange(1, ranks.shape[1] + 1, device=ranks.device) / ranks, ranks <= r
    last = ranks.masked_fill(~there, 0.0).amax(dim=1, keepdim=True)
    means = [(row.sum(dim=1, keepdim=True)) / r for row in (within, precision * within, precision)]
    return torch.cat([*((ranks[:, :1] <= k).double() for k in ks), *means, r / last], dim=1)


@torch.no_grad()
def agreement(student: Tensor, teacher: Tensor, k: int = 10, queries: Tensor | None = None) -> dict[str, float]:
    """How far two networks agree on nearest neighbors, without labels.

    ``overlap@k`` is the mean fraction of a row's K nearest neighbors in the teacher's space that are also among its K
    nearest in the student's space. If both sizes are equal, or ``queries`` are given, ``asymmetric@1`` and
    ``asymmetric@k`` are the fractions of rows whose nearest neighbor in the teacher's space is among the 1 or K teacher
    rows nearest to the student's row, as for a student that queries the teacher's index. A row is not its own neighbor.
    Random neighbors overlap by K / (N - 1), so with K + 1 rows or fewer everything agrees.

    A row that ties with the next one after the K is not among the K. Such rows of the teacher are left out of the mean,
    those of the student count as misses, so a collapsed student scores 0.

    Args:
        student: (N, Ds), any floating dtype.
        teacher: (N, Dt) of the same images, on the same device.
        k: at least 1.
        queries: (N, Dt) the student's rows projected to the teacher's space; by default ``student``.
    Returns:
        {metric: fraction}, 0 if every neighbor of the teacher is a tie.
    Raises:
        ValueError: no rows, shapes that do not match, non-finite values, or a ``k`` below 1.
    """
    check_rows(student, teacher)
    queries = student if queries is None else queries
    for rows in (student, teacher, queries):
        finite_in_range(rows)  # only to raise; ``nearest`` scales queries and gallery together
    if k < 1:
        raise ValueError(f"K must be at least 1, got {k}")
    alike = queries.shape == teacher.shape
    names = [f"overlap@{k}", *(["asymmetric@1", f"asymmetric@{k}"] if alike else [])]
    if len(student) == 1:
        return dict.fromkeys(names, 0.0)
    own = torch.arange(len(student), device=student.device)
    theirs = nearest(teacher, teacher, k + 1, own)
    overlaps = [_overlap(nearest(student, student, k + 1, own), k, theirs, k)]
    if alike:
        ours = nearest(queries, teacher, k + 1, own)
        overlaps += [_overlap(ours, 1, theirs, 1), _overlap(ours, k, theirs, 1)]
    return dict(zip(names, overlaps, strict=True))


def _overlap(ours: tuple[Tensor, Tensor], k: int, theirs: tuple[Tensor, Tensor], of: int) -> float:
    """The mean fraction of their first ``of`` neighbors, without ties, that are among our first K."""
    mine, wanted = _without_ties(*ours, k, -1), _without_ties(*theirs, of, -2)
    found = torch.stack([(mine == column[:, None]).any(dim=1) for column in wanted.unbind(dim=1)]).sum(dim=0)
    known = (wanted >= 0).sum(dim=1)
    return float((found.double() / known)[known > 0].mean().nan_to_num(0.0))


def _without_ties(distances: Tensor, rows: Tensor, k: int, blank: int) -> Tensor:
    """(N, K) the nearest rows, ``blank`` for those that tie with the next one after K."""
    return rows[:, :k].masked_fill(distances[:, :k] == distances[:, k : k + 1], blank) if rows.shape[1] > k else rows


def without_positive(labels: Tensor) -> int:
    """The number of rows that are alone in their class, which all metrics leave out.

    Args:
        labels: (N,) integers.
    Raises:
        ValueError: labels are not one-dimensional.
    """
    if labels.ndim != 1:
        raise ValueError(f"need (N,) labels, got {tuple(labels.shape)}")
    return int((_positives(labels) == 0).sum())


def _positives(labels: Tensor) -> Tensor:
    """(N,) the number of positives of each row."""
    _, classes, counts = torch.unique(labels, return_inverse=True, return_counts=True)
    positives: Tensor = counts[classes] - 1
    return positives


def _tiles(start: int, stop: int, size: int) -> list[slice]:
    return [slice(first, min(stop, first + size)) for first in range(start, stop, size)]


def _ranked_all(
    queries: Tensor, gallery: Tensor, labels: Tensor, ks: Sequence[int], depth: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """``_ranked`` for all queries with a positive, after checking the arguments."""
    if min(ks) < 1:
        raise ValueError(f"K must be at least 1, got {list(ks)}")
    queries, gallery = _checked(queries, gallery, labels=labels)
    yield from _ranked(queries, gallery, labels, _positives(labels).nonzero()[:, 0], depth)  # a sync


def _ranked(
    queries: Tensor, gallery: Tensor, labels: Tensor, asked: Tensor, depth: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """For blocks of queries: (B, depth) whether the i-th neighbor is a positive, (B, depth) its gallery row, (B,) the
    queries.

    Ties are ranked negatives first. ``depth`` + R neighbors suffice for that, R being a query's positives: ties that
    continue beyond them include enough negatives to push their positives past ``depth``.
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


def _tensors(*rows: Rows) -> list[Tensor]:
    """Arrays and lists as tensors on the device of the first; texts as their numbers in sorted order."""
    found: list[Tensor] = []
    for given in rows:
        if not isinstance(given, Tensor):
            array = np.asarray(given)
            array = np.unique(array, return_inverse=True)[1] if array.dtype.kind in "USO" else array
            given = torch.from_numpy(array).to(found[0].device if found else "cpu")
        found.append(given)
    return found


def _checked(*rows: Tensor, labels: Tensor) -> list[Tensor]:
    """Embeddings with equal N and D, scaled to the range of float32."""
    check_rows(*rows, labels=labels, same_size=True)
    return finite_in_range(*rows)[1]


def _fractions(hits: list[Tensor], ks: Sequence[int]) -> dict[int, float]:
    """{k: mean} over blocks of (B, len(ks)) hits."""
    fractions = torch.cat(hits).double().mean(dim=0).tolist() if hits else [0.0] * len(ks)
    return dict(zip(ks, fractions, strict=True))
