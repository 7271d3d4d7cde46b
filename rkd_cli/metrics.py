"""Retrieval metrics, block by block: no N x N matrix ever exists."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_BLOCK_ELEMENTS = 4 * 1024 * 1024  # of one block of distances: 16 MB in float32


@torch.no_grad()
def recall_at_k(embeddings: Tensor, labels: Tensor, ks: Sequence[int] = (1, 2, 4, 8)) -> dict[int, float]:
    """Recall@K (Jegou et al., PAMI 2011; Oh Song et al., CVPR 2016): how many queries find a positive in K neighbours.

    Every row is once the query, and all other rows are the gallery; distance is Euclidean. A query is a hit at K when
    fewer than K negatives are as near as its nearest positive: a tie counts against the query, so embeddings that
    have collapsed into one point score 0. A query without a positive is a miss.

    Args:
        embeddings: (N, D) float32 or float64; labels: (N,) integers, on the same device.
        ks: the values of K, each at least 1.
    Returns:
        {k: fraction of queries that are hits}.
    Raises:
        ValueError: no rows, shapes that do not match, or a K below 1.
    """
    n = len(embeddings)
    if embeddings.ndim != 2 or labels.shape != (n,) or n == 0:
        raise ValueError(f"need (N, D) embeddings and (N,) labels, got {embeddings.shape} and {labels.shape}")
    if min(ks) < 1:
        raise ValueError(f"K must be at least 1, got {list(ks)}")
    ranks = torch.cat(
        [
            _nearer_negatives(start, start + max(1, _BLOCK_ELEMENTS // n), embeddings, labels)
            for start in range(0, n, max(1, _BLOCK_ELEMENTS // n))
        ]
    )
    return {k: float((ranks < k).double().mean()) for k in ks}


def _nearer_negatives(start: int, stop: int, embeddings: Tensor, labels: Tensor) -> Tensor:
    """For the queries start..stop: how many negatives are as near as the nearest positive; no end where none is."""
    queries = embeddings[start:stop]  # (B, D)
    norms = embeddings.square().sum(dim=1)
    # the query's own norm shifts its whole row and changes no order
    distances = torch.addmm(norms[None, :], queries, embeddings.T, alpha=-2)  # (B, N)
    same = labels[start:stop, None] == labels[None, :]
    negatives = distances.masked_fill(same, torch.inf)
    distances.masked_fill_(~same, torch.inf)
    own = torch.arange(len(queries), device=queries.device)
    distances[own, start + own] = torch.inf
    nearest_positive = distances.amin(dim=1, keepdim=True)
    nearer = (negatives <= nearest_positive).sum(dim=1)
    return nearer.masked_fill(nearest_positive.squeeze(1).isinf(), torch.iinfo(torch.int64).max)
