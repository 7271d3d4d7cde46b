"""Nearest rows by faiss, for so many comparisons that building its index takes less time than it saves."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rkd_cli.geometry import squared_differences
from rkd_cli.retrieval import nearest

FROM = 10**9  # comparisons; on two cores, at 64 dimensions, building costs as many as 1.5e8 to 6e8 (`rkd bench search`)
_SAMPLE = 100  # queries that are answered exactly too
_GOAL = 0.99  # of their nearest that the index is to find: it looks into more cells until it does


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
    """``nearest`` among the rows in those cells of an inverted file (IVF) that are nearest to a query.

    The index picks rows, on the CPU; their distances are exact.

    Args:
        queries: (Q, D) float32.
        gallery: (M, D) float32.
        k: how many; a smaller gallery gives all that it has.
    """
    import faiss

    k = min(k, len(gallery))
    faiss.omp_set_num_threads(torch.get_num_threads())
    cells = max(1, int(len(gallery) ** 0.5))
    rows, asked = gallery.cpu().contiguous().numpy(), queries.cpu().contiguous().numpy()
    size = gallery.shape[1]
    index = faiss.IndexIVFFlat(faiss.IndexFlatL2(size), size, cells)
    index.train(rows)
    index.add(rows)
    every = max(1, len(queries) // _SAMPLE)
    exact = nearest(queries[::every], gallery, k)[1].cpu()
    index.nprobe = 8
    while True:
        found = torch.from_numpy(index.search(asked[::every], k)[1])
        recall = float((found[:, :, None] == exact[:, None, :]).any(dim=1).float().mean())
        if recall >= _GOAL or index.nprobe >= cells:
            break
        index.nprobe *= 2
    found = torch.from_numpy(index.search(asked, k)[1]).to(gallery.device)
    at = torch.arange(len(queries), device=gallery.device).repeat_interleave(k)
    squared = squared_differences(queries, gallery, at, found.flatten().clamp_min(0)).view(-1, k)
    squared, order = squared.masked_fill(found < 0, torch.inf).sort(dim=1, stable=True)
    return Nearest(squared.sqrt(), found.gather(1, order), recall)
