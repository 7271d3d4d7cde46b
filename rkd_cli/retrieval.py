"""The nearest rows of a gallery, block by block: no query x gallery matrix ever exists."""

from __future__ import annotations

import torch
from torch import Tensor

from rkd_cli.geometry import exact_products, squared_differences

BLOCK_ELEMENTS = 4 * 1024 * 1024  # of one block of distances: 16 MB in float32
_SPARE = 8  # candidates beyond k: the query itself, and so that rounding seldom decides which rows are among them


@torch.no_grad()
def nearest(queries: Tensor, gallery: Tensor, k: int, own: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The K nearest gallery rows of each query by Euclidean distance, exact where float32 products are not.

    Products in the type of the embeddings pick candidates; the candidates are subtracted in float64 and sorted. A query
    for which rounding could have kept a nearer row out is done again with products in float64. Queries and gallery may
    come from different networks of one embedding size.

    Args:
        queries: (Q, D), any floating type.
        gallery: (M, D), on the same device.
        k: how many, at least 1; a smaller gallery gives all that it has.
        own: (Q,) the row of the gallery that is the query itself, which is none of its neighbors. None where queries
            are not in the gallery.
    Returns:
        (Q, K) float64 distances in ascending order and (Q, K) rows of the gallery; equal distances in the order of the
        gallery. Which of several rows at exactly the last distance are among the K is open.
    Raises:
        ValueError: no rows, shapes that do not match, values that are not finite, or a ``k`` below 1.
    """
    _check(queries, gallery, k, own)
    k = min(k, len(gallery) - (own is not None))
    count = min(len(gallery), k + _SPARE)
    work = torch.promote_types(torch.promote_types(queries.dtype, gallery.dtype), torch.float32)
    center = gallery.to(work).mean(dim=0)  # about which products lose the fewest digits

    def search(block: Tensor, centered: Tensor, norms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, K) squared distances, (B, K) rows, and (B,) whether no nearer row can be missing."""
        x = queries[block].to(centered.dtype) - center.to(centered.dtype)  # (B, D)
        lengths = x.square().sum(dim=1)
        # squared distances, less the query's own norm, which shifts its whole row and changes no order
        products = torch.addmm(norms, x, centered.T, alpha=-2)  # (B, M)
        values, rows = products.topk(count, dim=1, largest=False)  # the query itself too
        rows = rows.sort(dim=1).values  # so that a stable sort leaves equal distances in the order of the gallery
        exact = squared_differences(queries, gallery, block.repeat_interleave(count), rows.flatten()).view(-1, count)
        if own is not None:
            exact.masked_fill_(rows == own[block, None], torch.inf)
        exact, order = exact.sort(dim=1, stable=True)
        # a row that was left out is no nearer than the last candidate, but for the error of its product
        error = rounding(centered)
        least = (values[:, -1] + lengths) * (1 - 2 * error) - 3 * error * lengths
        sure = (exact[:, k - 1] < least) | (count == len(gallery))
        return exact[:, :k], rows.gather(1, order[:, :k]), sure

    near = _about(gallery, center, work)
    again: tuple[Tensor, Tensor] | None = None  # the same in float64, if it comes to that
    size = max(1, BLOCK_ELEMENTS // len(gallery))
    distances, found = [], []
    with exact_products(queries.device):
        for block in torch.split(torch.arange(len(queries), device=queries.device), size):
            squared, rows, sure = search(block, *near)
            if work != torch.float64 and not bool(sure.all()):  # a sync
                again = again or _about(gallery, center, torch.float64)
                squared[~sure], rows[~sure], _ = search(block[~sure], *again)
            distances.append(squared.sqrt())
            found.append(rows)
    return torch.cat(distances), torch.cat(found)


def _about(gallery: Tensor, center: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(M, D) the gallery about its center, a copy, and (M,) its squared norms."""
    centered = gallery.to(dtype) - center.to(dtype)
    norms: Tensor = torch.linalg.vector_norm(centered, dim=1).square()  # without a second copy for the squares
    return centered, norms


def rounding(x: Tensor) -> float:
    """How far a squared distance of two rows that was found through their product may be off.

    Args:
        x: (N, D), the rows about their center.
    Returns:
        Six standard deviations of a sum of D rounded products, as a share of the sum of both squared norms.
    """
    return float(torch.finfo(x.dtype).eps * (x.shape[1] ** 0.5 + 4))


def _check(queries: Tensor, gallery: Tensor, k: int, own: Tensor | None) -> None:
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if queries.ndim != 2 or gallery.ndim != 2 or queries.shape[1] != gallery.shape[1]:
        raise ValueError(f"need (Q, D) queries and an (M, D) gallery, got {queries.shape} and {gallery.shape}")
    if len(queries) == 0 or len(gallery) <= (own is not None):
        raise ValueError(f"need a query and a gallery row besides it, got {queries.shape} and {gallery.shape}")
    if own is not None and own.shape != (len(queries),):
        raise ValueError(f"need the own row of each of {len(queries)} queries, got {own.shape}")
    if not bool(queries.isfinite().all() & gallery.isfinite().all()):  # a sync; NaN is nearer than nothing
        raise ValueError("the embeddings hold values that are not finite")
