"""Nearest rows by faiss, for so many comparisons that building its index takes less time than it saves."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rkd_cli.geometry import squared_differences
from rkd_cli.retrieval import finite_in_range, nearest

FROM = 3 * 10**10  # comparisons; building for a million rows takes as long as 2.5e10 of them (tests/bench/search.py)
_SAMPLE = 100  # queries that are answered exactly too
_GOAL = 0.99  # of their nearest that the index is to find: it follows more rows until it does
_LINKS = 32  # of a row
_ROWS = 64, 4096  # that it follows at first, and at most


@dataclass(frozen=True)
class Nearest:
    """(Q, K) float64 distances in ascending order and (Q, K) rows of the gallery, infinite and -1 where none was found;
    and which share of the exact answers to some of the queries is among them."""

    distances: Tensor
    rows: Tensor
    recall: float


def is_installed() -> bool:
    """Whether faiss is."""
    try:
        import faiss  # noqa: F401
    except ImportError:
        return False
    return True


def nearly_nearest(queries: Tensor, gallery: Tensor, k: int) -> Nearest:
    """``nearest`` among the rows that a graph of near rows (HNSW; Malkov and Yashunin, 2016) leads to.

    The index picks rows, on the CPU; their distances are exact.

    Args:
        queries: (Q, D) float32.
        gallery: (M, D) float32.
        k: how many; a smaller gallery gives all that it has.
    """
    import faiss

    k = min(k, len(gallery))
    faiss.omp_set_num_threads(torch.get_num_threads())
    _, scaled = finite_in_range(queries, gallery)
    asked, rows = (x.cpu().float().contiguous().numpy() for x in scaled)
    index = faiss.IndexHNSWFlat(gallery.shape[1], _LINKS)
    index.add(rows)
    every = max(1, len(queries) // _SAMPLE)
    exact = nearest(queries[::every], gallery, k)[1].cpu()
    index.hnsw.efSearch, most = _ROWS
    while True:
        found = torch.from_numpy(index.search(asked[::every], k)[1])
        recall = float((found[:, :, None] == exact[:, None, :]).any(dim=1).float().mean())
        if recall >= _GOAL or index.hnsw.efSearch >= most:
            break
        index.hnsw.efSearch *= 2
    found = torch.from_numpy(index.search(asked, k)[1]).to(gallery.device)
    at = torch.arange(len(queries), device=gallery.device).repeat_interleave(k)
    squared = squared_differences(queries, gallery, at, found.flatten().clamp_min(0)).view(-1, k)
    squared, order = squared.masked_fill(found < 0, torch.inf).sort(dim=1, stable=True)
    return Nearest(squared.sqrt(), found.gather(1, order), recall)
