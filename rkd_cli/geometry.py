"""Distances between rows of embeddings, with more digits than float32 arithmetic gives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# squared distances from a float64 Gram matrix below this fraction of the squared norms have too few digits
_DOUBTFUL = 1e-6
SMALLEST, LARGEST = 2.0**-10, 2.0**40  # magnitudes whose squares and sums of squares are precise in float32
_UNIT = 1e-3  # tolerance for the norm of a normalized row, which may be float16
_PAIR_ELEMENTS = 1 << 18  # elements to subtract at once: 2 MB in float64
_EVERY_PAIR = 1 << 25  # N * N * D up to which a GPU subtracts every pair: some 0.2 ms, and no sync


def check_rows(*rows: Tensor, labels: Tensor | None = None, same_size: bool = False) -> None:
    """Raise a ValueError unless all ``rows`` are floating (N, D) with one N, and one D if ``same_size``, and ``labels``
    are (N,). Otherwise torch would broadcast them."""
    images, size = rows[0].shape[0] if rows[0].ndim else 0, rows[0].shape[-1:]
    fine = all(x.ndim == 2 and x.numel() and len(x) == images and x.is_floating_point() for x in rows)
    if labels is not None:
        fine = fine and labels.shape == (images,)
    if not fine or (same_size and any(x.shape[1:] != size for x in rows)):
        need = " and ".join(["(N, D) embeddings"] * len(rows) + ["(N,) labels"] * (labels is not None))
        equal = "equal N and D" if same_size else "equal N"
        found = [f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}" for x in (*rows, labels) if x is not None]
        raise ValueError(f"need {need} with {equal}, floating and not empty, got {' and '.join(found)}")


def in_range(x: Tensor, dim: int | None = None) -> Tensor:
    """Scale by a power of two if squares would lose digits; in float32, or float64 for float64 input. No sync.

    No digit changes, so cosines, ratios and the order of distances stay. ``dim`` scales each slice along it on its own,
    1 for rows. The largest magnitude is then between 2^-10 and 2^40, 0 or not finite.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    sizes = wide.detach().abs()
    largest = sizes.amax() if dim is None else sizes.amax(dim=dim, keepdim=True)
    outside = ((largest < SMALLEST) | (largest > LARGEST)) & largest.isfinite()
    most = 126 if wide.dtype == torch.float32 else 1022  # larger powers are subnormal or infinite
    power = torch.ldexp(torch.ones_like(largest), -torch.frexp(largest).exponent.clamp(-most, most))
    return wide * power.masked_fill(~outside, 1.0)


def normalized(x: Tensor) -> Tensor:
    """(N, D) rows of any norm scaled to unit length, in their dtype; rows of zeros stay."""
    return F.normalize(in_range(x, dim=1), dim=1).to(x.dtype)


def squared_distances(x: Tensor) -> Tensor:
    """(N, N) float64 squared Euclidean distances between all rows of (N, D), to 9 digits or more at any scale.

    ||xi - xj||^2 = Gii + Gjj - 2 Gij cancels for close pairs. So the Gram matrix G of the centered rows is float64, and
    pairs that are too close even for that are subtracted. Rows that differ by less than one bit of ``x`` (of float32
    for narrower types) have distance 0. The gradient, 2 sum_j (g_ij + g_ji) (xi - xj), is as precise; differentiable
    once.
    """
    squared: Tensor = _SquaredDistances.apply(x)
    return squared


class _SquaredDistances(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        centered = _centered(x)
        squared = centered @ centered.T  # (N, N), the Gram matrix G
        norms = squared.diagonal().clone()
        squared.mul_(-2).add_(norms).add_(norms[:, None])
        close = (squared <= _DOUBTFUL * (norms + norms[:, None])).triu(diagonal=1)
        wide = x.double()
        lengths = wide.square().sum(dim=1)
        one_point = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps ** 2  # the last bit, squared
        if _subtracts_every_pair(x):
            exact = torch.cdist(wide, wide, compute_mode="donot_use_mm_for_euclid_dist").square_()
            exact.masked_fill_(exact <= one_point * (lengths[:, None] + lengths), 0.0)
            return torch.where(close | close.T, exact, squared).fill_diagonal_(0.0)
        i, j = close.nonzero(as_tuple=True)  # a sync on CUDA
        exact = squared_differences(x, x, i, j)
        exact.masked_fill_(exact <= one_point * (lengths[i] + lengths[j]), 0.0)
        squared[i, j] = squared[j, i] = exact
        return squared.fill_diagonal_(0.0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        centered, pull = _centered(x), grad + grad.T
        gradient: Tensor = 2 * (pull.sum(dim=1, keepdim=True) * centered - pull @ centered)
        return gradient.to(x.dtype)


def _subtracts_every_pair(x: Tensor) -> bool:
    """Whether close pairs are picked from the differences of all pairs: to pick them first, a GPU has to wait."""
    return x.device.type != "cpu" and len(x) * x.numel() <= _EVERY_PAIR


def _centered(x: Tensor) -> Tensor:
    wide = x.double()  # float64: no autocast, no TF32
    return wide - wide.mean(dim=0)


def squared_differences(x: Tensor, y: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """(P,) float64 squared distances of rows ``i`` of ``x`` to rows ``j`` of ``y``, subtracted in float64 in blocks."""
    size = max(1, _PAIR_ELEMENTS // x.shape[1])
    # torch.compile of torch 2.11 fails on a split of no rows
    pairs = zip(torch.split(i, size), torch.split(j, size), strict=True) if len(i) else [(i, j)]
    return torch.cat([(x[a].double() - y[b].double()).square_().sum(dim=1) for a, b in pairs])


def pairwise_distances(x: Tensor, eps: float = 1e-12) -> Tensor:
    """(N, N) float64 Euclidean distances as in the published RKD code: squares clamped to ``eps``, the diagonal 0.

    Two equal rows are thus 1e-6 apart and have no gradient.
    """
    distances = squared_distances(x).clamp(min=eps).sqrt()
    return distances.masked_fill(torch.eye(len(x), dtype=torch.bool, device=x.device), 0.0)


def unit_rows(x: Tensor) -> Tensor:
    """(N, D) rows scaled to unit length in float64, so that products are cosines. A row of zeros stays and has no
    gradient."""
    wide = in_range(x, dim=1) if x.dtype == torch.float64 else x.double()  # squares of narrower types fit float64
    lengths: Tensor = torch.linalg.vector_norm(wide, dim=1, keepdim=True)
    return wide / lengths.masked_fill(lengths == 0, torch.inf)


def is_unit(x: Tensor, rounding: float = 0.0) -> bool:
    """Whether all rows of (N, D) have norm 1, up to float16 rounding and ``rounding`` more."""
    return bool(((torch.linalg.vector_norm(x, dim=1) - 1).abs() < _UNIT + rounding).all())


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Compute matrix products on ``device`` in their operands' dtype, even if autocast, TF32 or bf16 are on."""
    cpu: Any = torch.backends.mkldnn
    matmul: Any = torch.backends.cuda.matmul if device.type == "cuda" else cpu.matmul
    with ExitStack() as stack:
        stack.enter_context(torch.autocast(device.type, enabled=False))
        before = matmul.fp32_precision
        if before not in ("none", "ieee"):  # none is torch's default, which is exact
            stack.callback(_restore, matmul, before)
            matmul.fp32_precision = "ieee"
        yield


def _restore(matmul: Any, precision: str) -> None:
    """Restore ``none`` if the value read came from torch's global setting."""
    matmul.fp32_precision = "none"
    if matmul.fp32_precision != precision:
        matmul.fp32_precision = precision
