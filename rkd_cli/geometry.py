"""Distances between the rows of one batch of embeddings, exact where float32 arithmetic is not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

# Two rows nearer than this, relative to their own length, are one point: float64 cannot tell their distance from
# rounding. In float32 data that is one part in 10^7, the last bit.
_COINCIDENT = 1e-14


def squared_distances(x: Tensor) -> Tensor:
    """Squared Euclidean distances between all rows, in float64, exactly 0 on the diagonal and between equal rows.

    ||xi - xj||^2 = Gii + Gjj - 2 Gij loses close pairs to cancellation in float32, so the Gram matrix G of the centred
    rows is taken in float64: N^2 D multiply-adds, little beside the network that made the embeddings. The gradient,
    2 sum_j (g_ij + g_ji) (xi - xj), loses nothing in the type of ``x``.

    Args:
        x: (N, D), any floating type.
    Returns:
        (N, N) float64, differentiable.
    """
    squared: Tensor = _SquaredDistances.apply(x)
    return squared


class _SquaredDistances(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        centred = x.double()
        centred = centred - centred.mean(dim=0)
        squared = centred @ centred.T  # (N, N), the Gram matrix G
        norms = squared.diagonal().clone()
        squared.mul_(-2).add_(norms).add_(norms[:, None])
        return squared.masked_fill_(squared <= _COINCIDENT * (norms + norms[:, None]), 0.0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        work = torch.promote_types(x.dtype, torch.float32)
        x, pull = x.to(work), (grad + grad.T).to(work)
        x = x - x.mean(dim=0)
        with torch.autocast(x.device.type, enabled=False), exact_products():
            gradient: Tensor = 2 * (pull.sum(dim=1, keepdim=True) * x - pull @ x)
        return gradient.to(ctx.saved_tensors[0].dtype)


def pairwise_distances(x: Tensor, eps: float = 1e-12) -> Tensor:
    """Euclidean distances as the published code takes them: squares below ``eps`` count as ``eps``, the diagonal is 0.

    So two equal rows are 1e-6 apart, a positive distance, and pass no gradient.

    Args:
        x: (N, D), any floating type.
    Returns:
        (N, N) float64, differentiable.
    """
    distances = squared_distances(x).clamp(min=eps).sqrt()
    return distances.masked_fill(torch.eye(len(x), dtype=torch.bool, device=x.device), 0.0)


@contextmanager
def exact_products() -> Iterator[None]:
    """Matrix products in full float32, also while the networks around use TF32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
