"""Exact nearest neighbors, computed in tiles and without copies: the gallery may be a memory-mapped file."""

from __future__ import annotations

from math import frexp, isfinite

import torch
from torch import Tensor

from rkd_cli.geometry import LARGEST, exact_products, squared_differences

BLOCK_ELEMENTS = 4 * 1024 * 1024  # of one tile of distances: 16 MB in float32
_ROWS = 512  # queries of a tile: fewer read the gallery more often, more make tiles narrow
_SPARE = 8  # candidates beyond k: the query itself, and a reserve against rounding


@torch.no_grad()
def nearest(queries: Tensor, gallery: Tensor, k: int, own: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The K nearest gallery rows of each query by Euclidean distance, exact to float64.

    Matrix products in the embeddings' dtype pick candidates, whose distances are computed in float64 by subtraction and
    sorted. If rounding could have missed a nearer row, the query is searched again with float64 products. If values
    exceed 2^40, or all are below 2^-40, scaled copies of queries and gallery are used.

    Args:
        queries: (Q, D), any floating dtype.
        gallery: (M, D), on the same device.
        k: number of neighbors, at least 1; a smaller gallery is returned whole.
        own: (Q,) the gallery row of each query itself, which is left out; None if queries are not in the gallery.
    Returns:
        (Q, K) ascending float64 distances and (Q, K) gallery rows; ties in gallery order. If rows tie for the last
        place, which of them is returned is undefined.
    Raises:
        ValueError: no rows, shapes that do not match, non-finite values, or a ``k`` below 1.
    """
    _check(queries, gallery, k, own)
    power, (queries, gallery) = finite_in_range(queries, gallery)
    k = min(k, len(gallery) - (own is not None))
    count = min(len(gallery), k + _SPARE)
    work = torch.promote_types(torch.promote_types(queries.dtype, gallery.dtype), torch.float32)
    center = gallery.mean(dim=0, dtype=work)  # centering costs products the fewest digits
    # tiles much wider than the number of candidates
    high = max(1, min(len(queries), _ROWS, BLOCK_ELEMENTS // (4 * count)))
    wide = max(count, BLOCK_ELEMENTS // max(high, queries.shape[1]))

    def search(block: Tensor, center: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, K) squared distances, (B, K) rows, and (B,) whether they are certainly the nearest."""
        x = queries[block].to(center.dtype) - center  # (B, D)
        lengths = x.square().sum(dim=1)
        values, rows = lengths.new_empty(len(x), 0), block.new_empty(len(x), 0)
        for start, tile in zip(range(0, len(gallery), wide), torch.split(gallery, wide), strict=True):
            y = tile.to(center.dtype) - center
            # squared distances without the query's norm, which does not change the order
            products = torch.addmm(y.square().sum(dim=1), x, y.T, alpha=-2)  # (B, M of the tile)
            near = products.topk(min(count, len(tile)), dim=1, largest=False)  # includes the query itself
            values, rows = torch.cat([values, near.values], dim=1), torch.cat([rows, near.indices + start], dim=1)
            values, best = values.topk(min(count, values.shape[1]), dim=1, largest=False)
            rows = rows.gather(1, best)
        rows = rows.sort(dim=1).values  # the stable sort below then leaves ties in gallery order
        exact = squared_differences(queries, gallery, block.repeat_interleave(count), rows.flatten()).view(-1, count)
        if own is not None:
            exact.masked_fill_(rows == own[block, None], torch.inf)
        exact, order = exact.sort(dim=1, stable=True)
        # a row that is no candidate is at least as far as the last one, up to the error of its product
        error = rounding(x)
        least = (values.amax(dim=1) + lengths) * (1 - 2 * error) - 3 * error * lengths - underflow(x)
        sure = (exact[:, k - 1] < least) | (count == len(gallery))
        return exact[:, :k], rows.gather(1, order[:, :k]), sure

    # allocated once: small tensors between the large tiles would fragment memory
    distances = torch.empty(len(queries), k, dtype=torch.float64, device=queries.device)
    found = torch.empty(len(queries), k, dtype=torch.int64, device=queries.device)
    with exact_products(queries.device):
        for block in torch.split(torch.arange(len(queries), device=queries.device), high):
            squared, rows, sure = search(block, center)
            doubt = (~sure).nonzero()[:, 0]  # a sync
            if work != torch.float64 and len(doubt):
                squared[doubt], rows[doubt], sure[doubt] = search(block[doubt], center.double())
                doubt = (~sure).nonzero()[:, 0]
            if len(doubt):  # ties, or outliers that pull the mean away from all other rows
                again, there, _ = search(block[doubt], torch.zeros_like(center).double())
                nearer = again.sum(dim=1) < squared[doubt].sum(dim=1)
                squared[doubt[nearer]], rows[doubt[nearer]] = again[nearer], there[nearer]
            distances[block], found[block] = squared.sqrt() / power, rows
    return distances, found


def rounding(x: Tensor) -> float:
    """Error of a squared distance computed from a product of centered (N, D) rows, relative to the sum of their squared
    norms: six standard deviations of a sum of D rounded products."""
    return float(torch.finfo(x.dtype).eps * (x.shape[1] ** 0.5 + 4))


def underflow(x: Tensor) -> float:
    """Bound of the error of a squared distance from squares that underflow."""
    return 16 * x.shape[1] * float(torch.finfo(x.dtype).tiny)


def finite_in_range(*rows: Tensor) -> tuple[float, list[Tensor]]:
    """Scale embeddings of one space by one power of two if their float32 squares would overflow or underflow; a sync.

    Returns the power and float64 copies, or 1 and the embeddings themselves if they are in range.
    """
    ends = torch.stack([end.detach().double() for x in rows for end in x.aminmax()])
    largest = float(ends.abs().amax())  # aminmax returns NaN if there is one
    if not isfinite(largest):  # comparisons with NaN are false, so NaN would count as near
        raise ValueError("the embeddings contain values that are not finite")
    if largest == 0 or 1 / LARGEST <= largest <= LARGEST:
        return 1.0, list(rows)
    power = 2.0 ** -min(max(frexp(largest)[1], -1000), 1000)
    return power, [x.double() * power for x in rows]


def _check(queries: Tensor, gallery: Tensor, k: int, own: Tensor | None) -> None:
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    floating = queries.is_floating_point() and gallery.is_floating_point()
    if not floating or queries.ndim != 2 or gallery.ndim != 2 or queries.shape[1] != gallery.shape[1]:
        found = f"{tuple(queries.shape)} {queries.dtype} and {tuple(gallery.shape)} {gallery.dtype}"
        raise ValueError(f"need floating (Q, D) queries and (M, D) gallery, got {found}")
    if len(queries) == 0 or len(gallery) <= (own is not None):
        raise ValueError(f"need a query and another gallery row, got {tuple(queries.shape)} and {tuple(gallery.shape)}")
    if own is not None and own.shape != (len(queries),):
        raise ValueError(f"own must have shape ({len(queries)},), got {tuple(own.shape)}")
