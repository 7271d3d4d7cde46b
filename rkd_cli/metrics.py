"""Retrieval metrics, block by block: no N x N matrix ever exists.

In all of them every row is once the query and all other rows are the gallery; distance is Euclidean. A query without a
positive has nothing to find: it is left out of the mean, and ``without_positive`` counts such queries.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from rkd_cli.geometry import exact_products

_BLOCK_ELEMENTS = 4 * 1024 * 1024  # of one block of distances: 16 MB in float32


@torch.no_grad()
def recall_at_k(embeddings: Tensor, labels: Tensor, ks: Sequence[int] = (1, 2, 4, 8)) -> dict[int, float]:
    """Recall@K (Oh Song et al., CVPR 2016): the share of queries that have a positive among their K neighbours.

    A query is a hit at K when fewer than K negatives are as near as its nearest positive: a tie, to within rounding,
    counts against the query, so embeddings that have collapsed into one point score 0.

    Args:
        embeddings: (N, D) float32 or float64; labels: (N,) integers, on the same device.
        ks: the values of K, each at least 1.
    Returns:
        {k: fraction of queries that are hits}, 0 where no query has a positive.
    Raises:
        ValueError: no rows, shapes that do not match, values that are not finite, or a K below 1.
    """
    if min(ks) < 1:
        raise ValueError(f"K must be at least 1, got {list(ks)}")
    x = _centred(embeddings, labels)
    order = labels.argsort()  # so that the positives of neighbouring queries are neighbouring columns
    x, y = x[order], labels[order]
    norms = x.square().sum(dim=1)
    _, classes, counts = torch.unique_consecutive(y, return_inverse=True, return_counts=True)
    ends = counts.cumsum(dim=0)
    first, last = (ends - counts)[classes].tolist(), ends[classes].tolist()  # row i's class is first[i]:last[i]; a sync
    n = len(x)
    size = max(1, _BLOCK_ELEMENTS // n)
    blocks = [slice(start, min(n, start + size)) for start in range(0, n, size)]

    def distances(rows: slice, columns: slice) -> Tensor:  # squared
        return torch.addmm(norms[columns], x[rows], x[columns].T, alpha=-2).add_(norms[rows, None])

    nearest = torch.empty_like(norms)  # of the positives
    with exact_products():
        for rows in blocks:
            columns = slice(first[rows.start], last[rows.stop - 1])
            positives = y[rows, None] == y[columns]
            positives.diagonal(rows.start - columns.start).fill_(False)  # the query itself
            nearest[rows] = distances(rows, columns).masked_fill_(~positives, torch.inf).amin(dim=1)
        # the same two rows, multiplied in another block, may differ in their last bits
        reach = nearest + 8 * torch.finfo(x.dtype).eps * (norms + nearest)

        nearer = torch.zeros_like(norms)  # negatives within reach; distances are symmetric, each block serves twice
        for rows in blocks:
            d = distances(rows, slice(rows.start, n))
            same = slice(rows.start, last[rows.stop - 1])
            d[:, : same.stop - same.start].masked_fill_(y[rows, None] == y[same], torch.inf)
            within = torch.empty_like(d)  # as floats, which add up many times faster than bools
            nearer[rows] += torch.le(d, reach[rows, None], out=within).sum(dim=1)
            height = len(d)
            nearer[rows.stop :] += torch.le(d[:, height:], reach[rows.stop :], out=within[:, height:]).sum(dim=0)
    rank = nearer[counts[classes] > 1]
    return {k: float((rank < k).double().mean()) if len(rank) else 0.0 for k in ks}


@torch.no_grad()
def r_precision(embeddings: Tensor, labels: Tensor) -> float:
    """R-Precision (Musgrave et al., ECCV 2020, section 3.2): the share of positives among a query's R neighbours.

    R is the query's own number of positives.

    Args and Raises: as ``recall_at_k``.
    Returns:
        The mean over queries, 0 where no query has a positive.
    """
    return _mean([found.sum(dim=1) / counts for found, counts in _first_r(embeddings, labels)])


@torch.no_grad()
def map_at_r(embeddings: Tensor, labels: Tensor) -> float:
    """MAP@R (Musgrave et al., ECCV 2020, equation 1): average precision over a query's R neighbours.

    1/R sum_i P(i), where P(i) is the precision among the i nearest if the i-th is a positive, else 0.

    Args and Raises: as ``recall_at_k``.
    Returns:
        The mean over queries, 0 where no query has a positive.
    """
    means = []
    for found, counts in _first_r(embeddings, labels):
        precision = found.cumsum(dim=1) / torch.arange(1, found.shape[1] + 1, device=found.device)
        means.append((precision * found).sum(dim=1) / counts)
    return _mean(means)


def without_positive(labels: Tensor) -> int:
    """How many rows are alone in their class, so that every metric here leaves them out."""
    _, counts = torch.unique(labels, return_counts=True)
    return int((counts == 1).sum())


def _blocks(embeddings: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(B, N) distances of a block of queries, the query itself at -inf, and the (B, N) mask of their positives."""
    x = _centred(embeddings, labels)
    n = len(x)
    norms = x.square().sum(dim=1)
    size = max(1, _BLOCK_ELEMENTS // n)
    for start in range(0, n, size):
        queries = x[start : start + size]  # (B, D)
        # squared, less the query's own norm, which shifts its whole row and changes no order
        with exact_products():
            distances = torch.addmm(norms[None, :], queries, x.T, alpha=-2)  # (B, N)
        row = torch.arange(len(queries), device=queries.device)
        distances[row, start + row] = -torch.inf
        positives = labels[start : start + size, None] == labels[None, :]
        positives[row, start + row] = False
        yield distances, positives


def _centred(embeddings: Tensor, labels: Tensor) -> Tensor:
    """The embeddings about their mean, where products lose the fewest digits."""
    if embeddings.ndim != 2 or labels.shape != (len(embeddings),) or len(embeddings) == 0:
        raise ValueError(f"need (N, D) embeddings and (N,) labels, got {embeddings.shape} and {labels.shape}")
    if not bool(embeddings.isfinite().all()):  # a sync; a comparison with NaN is false, so NaN would pass for a hit
        raise ValueError("the embeddings hold values that are not finite")
    x = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
    return x - x.mean(dim=0)


def _first_r(embeddings: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """For the queries of each block that have positives: (B, max R) whether the i-th neighbour is a positive, 0 from
    the query's own R on, and (B,) R."""
    for distances, positives in _blocks(embeddings, labels):
        counts = positives.sum(dim=1)
        most = int(counts.max())  # a sync on CUDA
        nearest = distances.topk(most + 1, dim=1, largest=False).indices[:, 1:]  # (B, max R), the query itself is first
        within = torch.arange(most, device=counts.device) < counts[:, None]
        found = (positives.gather(1, nearest) & within).double()
        yield found[counts > 0], counts[counts > 0]


def _mean(blocks: list[Tensor]) -> float:
    values = torch.cat(blocks)
    return float(values.mean()) if len(values) else 0.0
