"""Distances between rows of embeddings, exact where float32 arithmetic is not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Of the squares of a Gram matrix in float64, those below this share of the rows' own have too few digits left.
_DOUBTFUL = 1e-6
SMALLEST, LARGEST = 2.0**-10, 2.0**40  # magnitudes within which squares and their sums keep their digits in float32
_UNIT = 1e-3  # by which the length of a row that was scaled to 1, perhaps in float16, may be off
_PAIR_ELEMENTS = 1 << 18  # coordinates of the pairs that are subtracted at once: 2 MB in float64


def check_rows(*rows: Tensor, labels: Tensor | None = None, same_size: bool = False) -> None:
    """Refuse embeddings that are not of the same images, before they are broadcast. Looks at shapes and types alone.

    Args:
        rows: (N, D) each, any floating type; D may differ.
        labels: (N,) of the same images.
        same_size: D must not differ.
    Raises:
        ValueError: another shape, another N, no row, or a type that is not floating; names all shapes.
    """
    images, size = rows[0].shape[0] if rows[0].ndim else 0, rows[0].shape[-1:]
    fine = all(x.ndim == 2 and x.numel() and len(x) == images and x.is_floating_point() for x in rows)
    if labels is not None:
        fine = fine and labels.shape == (images,)
    if not fine or (same_size and any(x.shape[1:] != size for x in rows)):
        need = " and ".join(["(N, D) embeddings"] * len(rows) + ["(N,) labels"] * (labels is not None))
        of = "one N and one D" if same_size else "one N"
        found = [f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}" for x in (*rows, labels) if x is not None]
        raise ValueError(f"need {need} of {of}, floating and not empty, got {' and '.join(found)}")


def in_range(x: Tensor, dim: int | None = None) -> Tensor:
    """Embeddings times a power of two where their squares, or a least square, would cost digits; else as they are.

    That changes no digit, so it is for what has no unit: cosines, relations, the order of distances. No sync.

    Args:
        x: any shape, any floating type.
        dim: scale each slice along it on its own, 1 for rows; without it all by one power.
    Returns:
        float32, or the wider type of ``x``; the largest magnitude is between 2^-10 and 2^40, 0 or not finite.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    sizes = wide.detach().abs()
    largest = sizes.amax() if dim is None else sizes.amax(dim=dim, keepdim=True)
    outside = ((largest < SMALLEST) | (largest > LARGEST)) & largest.isfinite()
    most = 126 if wide.dtype == torch.float32 else 1022  # beyond it the power is no normal number
    power = torch.ldexp(torch.ones_like(largest), -torch.frexp(largest).exponent.clamp(-most, most))
    return wide * power.masked_fill(~outside, 1.0)


def normalized(x: Tensor) -> Tensor:
    """Rows scaled to unit length in their own type, at any length; rows of zeros stay.

    Args:
        x: (N, D), any floating type.
    Returns:
        (N, D) of the same type.
    """
    return F.normalize(in_range(x, dim=1), dim=1).to(x.dtype)


def squared_distances(x: Tensor) -> Tensor:
    """Squared Euclidean distances between all rows, to 9 digits or more at any scale.

    ||xi - xj||^2 = Gii + Gjj - 2 Gij loses close pairs to cancellation, so the Gram matrix G of the centered rows is
    taken in float64 (N^2 D multiply-adds, little beside the network that made the embeddings), and pairs that are
    close even for that are subtracted. Rows that differ by less than the last bit of ``x``, but never of less than
    float32, are one point: 0 apart. The gradient, 2 sum_j (g_ij + g_ji) (xi - xj), is as exact.

    Args:
        x: (N, D), any floating type.
    Returns:
        (N, N) float64, differentiable once; 0 on the diagonal.
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
        i, j = close.nonzero(as_tuple=True)  # a sync on CUDA
        exact = squared_differences(x, x, i, j)
        lengths = x.double().square().sum(dim=1)
        last_bit = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps
        exact.masked_fill_(exact <= last_bit**2 * (lengths[i] + lengths[j]), 0.0)
        squared[i, j] = squared[j, i] = exact
        return squared.fill_diagonal_(0.0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        centered, pull = _centered(x), grad + grad.T
        gradient: Tensor = 2 * (pull.sum(dim=1, keepdim=True) * centered - pull @ centered)
        return gradient.to(x.dtype)


def _centered(x: Tensor) -> Tensor:
    wide = x.double()  # which neither autocast nor TF32 touches
    return wide - wide.mean(dim=0)


def squared_differences(x: Tensor, y: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """Squared Euclidean distances of P pairs of rows, subtracted in float64: exact, and equal for equal rows.

    Args:
        x: (N, D), any floating type.
        y: (M, D), likewise.
        i: (P,) rows of ``x``.
        j: (P,) rows of ``y``.
    Returns:
        (P,) float64; memory beside it is bounded.
    """
    size = max(1, _PAIR_ELEMENTS // x.shape[1])
    # torch.compile of torch 2.11 fails on a split of no rows
    pairs = zip(torch.split(i, size), torch.split(j, size), strict=True) if len(i) else [(i, j)]
    return torch.cat([(x[a].double() - y[b].double()).square_().sum(dim=1) for a, b in pairs])


def pairwise_distances(x: Tensor, eps: float = 1e-12) -> Tensor:
    """Euclidean distances as the published code takes them: squares below ``eps`` count as ``eps``, the diagonal is 0.

    So two equal rows are 1e-6 apart, a positive distance, and pass no gradient.

    Args:
        x: (N, D), any floating type.
        eps: the least square.
    Returns:
        (N, N) float64, differentiable once.
    """
    distances = squared_distances(x).clamp(min=eps).sqrt()
    return distances.masked_fill(torch.eye(len(x), dtype=torch.bool, device=x.device), 0.0)


def unit_rows(x: Tensor) -> Tensor:
    """Rows scaled to unit length, so that the product of two is their cosine.

    A row of zeros has no direction: it stays as it is, at a cosine of 0 to every other, and passes no gradient.

    Args:
        x: (N, D), any floating type.
    Returns:
        (N, D) float64, which neither autocast nor TF32 touches.
    """
    wide = in_range(x, dim=1) if x.dtype == torch.float64 else x.double()  # whose squares are always in range
    lengths: Tensor = torch.linalg.vector_norm(wide, dim=1, keepdim=True)
    return wide / lengths.masked_fill(lengths == 0, torch.inf)


def is_unit(x: Tensor) -> bool:
    """Whether all rows of (N, D) have a length of 1, but for the rounding of float16."""
    return bool(((torch.linalg.vector_norm(x, dim=1) - 1).abs() < _UNIT).all())


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Matrix products in the type of their factors, also where autocast, TF32 or bf16 products are switched on.

    Args:
        device: where the factors are.
    """
    cpu: Any = torch.backends.mkldnn
    matmul: Any = torch.backends.cuda.matmul if device.type == "cuda" else cpu.matmul
    with ExitStack() as stack:
        stack.enter_context(torch.autocast(device.type, enabled=False))
        before = matmul.fp32_precision
        if before not in ("none", "ieee"):  # none: as torch has it by default, and that is exact
            stack.callback(_restore, matmul, before)
            matmul.fp32_precision = "ieee"
        yield


def _restore(matmul: Any, precision: str) -> None:
    """What was read may have been the switch of all of torch, so the switch of products is left open if it was."""
    matmul.fp32_precision = "none"
    if matmul.fp32_precision != precision:
        matmul.fp32_precision = precision
