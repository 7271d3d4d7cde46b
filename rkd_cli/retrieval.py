"""The nearest rows of a gallery, tile by tile: no query x gallery matrix ever exists, and no copy of either, so that
a gallery may be larger than memory, in a file that is mapped."""

from __future__ import annotations

from math import frexp, isfinite

import torch
from torch import Tensor

from rkd_cli.geometry import LARGEST, exact_products, squared_differences

BLOCK_ELEMENTS = 4 * 1024 * 1024  # of one tile of distances: 16 MB in float32
_ROWS = 512  # queries of a tile, at most: fewer read the gallery more often, more leave tiles narrow
_SPARE = 8  # candidates beyond k: the query itself, and so that rounding seldom decides which rows are among them


@torch.no_grad()
def nearest(queries: Tensor, gallery: Tensor, k: int, own: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The K nearest gallery rows of each query by Euclidean distance, exact where float32 products are not.

    Products in the type of the embeddings pick candidates; the candidates are subtracted in float64 and sorted. A query
    for which rounding could have kept a nearer row out is done again with products in float64. Queries and gallery may
    come from different networks of one embedding size. Where their values are beyond 2^40, or all below 2^-40, both are
    copied, times a power of two.

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
    power, (queries, gallery) = finite_in_range(queries, gallery)
    k = min(k, len(gallery) - (own is not None))
    count = min(len(gallery), k + _SPARE)
    work = torch.promote_types(torch.promote_types(queries.dtype, gallery.dtype), torch.float32)
    center = gallery.mean(dim=0, dtype=work)  # about which products lose the fewest digits
    # never so narrow that much of a tile is candidates
    high = max(1, min(len(queries), _ROWS, BLOCK_ELEMENTS // (4 * count)))
    wide = max(count, BLOCK_ELEMENTS // max(high, queries.shape[1]))

    def search(block: Tensor, center: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, K) squared distances, (B, K) rows, and (B,) whether no nearer row can be missing."""
        x = queries[block].to(center.dtype) - center  # (B, D)
        lengths = x.square().sum(dim=1)
        values, rows = lengths.new_empty(len(x), 0), block.new_empty(len(x), 0)
        for start, tile in zip(range(0, len(gallery), wide), torch.split(gallery, wide), strict=True):
            y = tile.to(center.dtype) - center
            # squared distances, less the query's own norm, which shifts its whole row and changes no order
            products = torch.addmm(y.square().sum(dim=1), x, y.T, alpha=-2)  # (B, M of the tile)
            near = products.topk(min(count, len(tile)), dim=1, largest=False)  # the query itself too
            values, rows = torch.cat([values, near.values], dim=1), torch.cat([rows, near.indices + start], dim=1)
            values, best = values.topk(min(count, values.shape[1]), dim=1, largest=False)
            rows = rows.gather(1, best)
        rows = rows.sort(dim=1).values  # so that a stable sort leaves equal distances in the order of the gallery
        exact = squared_differences(queries, gallery, block.repeat_interleave(count), rows.flatten()).view(-1, count)
        if own is not None:
            exact.masked_fill_(rows == own[block, None], torch.inf)
        exact, order = exact.sort(dim=1, stable=True)
        # a row that was left out is no nearer than the last candidate, but for the error of its product
        error = rounding(x)
        least = (values.amax(dim=1) + lengths) * (1 - 2 * error) - 3 * error * lengths - underflow(x)
        sure = (exact[:, k - 1] < least) | (count == len(gallery))
        return exact[:, :k], rows.gather(1, order[:, :k]), sure

    # made once: small ones kept between the tiles' large ones would fragment memory
    distances = torch.empty(len(queries), k, dtype=torch.float64, device=queries.device)
    found = torch.empty(len(queries), k, dtype=torch.int64, device=queries.device)
    with exact_products(queries.device):
        for block in torch.split(torch.arange(len(queries), device=queries.device), high):
            squared, rows, sure = search(block, center)
            doubt = (~sure).nonzero()[:, 0]  # a sync
            if work != torch.float64 and len(doubt):
                squared[doubt], rows[doubt], sure[doubt] = search(block[doubt], center.double())
                doubt = (~sure).nonzero()[:, 0]
            if len(doubt):  # ties; or a few rows far away, which draw the mean away from all others
                again, there, _ = search(block[doubt], torch.zeros_like(center).double())
                nearer = again.sum(dim=1) < squared[doubt].sum(dim=1)
                squared[doubt[nearer]], rows[doubt[nearer]] = again[nearer], there[nearer]
            distances[block], found[block] = squared.sqrt() / power, rows
    return distances, found


def rounding(x: Tensor) -> float:
    """How far a squared distance of two rows that was found through their product may be off.

    Args:
        x: (N, D), the rows about their center.
    Returns:
        Six standard deviations of a sum of D rounded products, as a share of the sum of both squared norms.
    """
    return float(torch.finfo(x.dtype).eps * (x.shape[1] ** 0.5 + 4))


def underflow(x: Tensor) -> float:
    """How much of a squared distance may be lost in squares that are too small for the type, as a bound."""
    return 16 * x.shape[1] * float(torch.finfo(x.dtype).tiny)


def finite_in_range(*rows: Tensor) -> tuple[float, list[Tensor]]:
    """Embeddings of one space times a power of two, where float32 squares would overflow or vanish; a sync.

    Args:
        rows: (N, D) each, any floating type; N may differ.
    Returns:
        The power of two, and copies in float64; 1 and the embeddings themselves where they are in range.
    Raises:
        ValueError: a value that is not finite.
    """
    ends = torch.stack([end.detach().double() for x in rows for end in x.aminmax()])
    largest = float(ends.abs().amax())  # a NaN is every end
    if not isfinite(largest):  # a comparison with NaN is false, so NaN would pass for near
        raise ValueError("the embeddings hold values that are not finite")
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
        raise ValueError(f"need (Q, D) queries and an (M, D) gallery, floating, got {found}")
    if len(queries) == 0 or len(gallery) <= (own is not None):
        raise ValueError(f"need a query and a gallery row besides it, got {queries.shape} and {gallery.shape}")
    if own is not None and own.shape != (len(queries),):
        raise ValueError(f"need the own row of each of {len(queries)} queries, got {own.shape}")
