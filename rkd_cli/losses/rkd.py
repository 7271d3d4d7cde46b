"""Relational knowledge distillation (Park, Kim, Lu, Cho; CVPR 2019; arXiv 1904.05068)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rkd_cli.geometry import pairwise_distances, squared_distances


class RKDDistance(nn.Module):
    """Distance-wise loss, equations 4 to 6: smooth-L1 between pair distances, each set divided by its own mean.

    The mean runs over all N^2 ordered pairs, the zero diagonal included; the unit mu is the mean over positive
    distances, and the student's mu is part of the gradient.

    Args (of the call):
        student: (N, Ds) embeddings.
        teacher: (N, Dt) embeddings; no gradient flows to them.
    Returns:
        () loss in the student's type; 0 for fewer than two rows.
    """

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        if len(student) < 2:
            return student.sum() * 0
        with torch.no_grad():
            target = _in_mean_units(pairwise_distances(teacher))
        distances = _in_mean_units(pairwise_distances(student))
        return F.smooth_l1_loss(distances, target).to(student.dtype)


def _in_mean_units(distances: Tensor) -> Tensor:
    n = len(distances)  # every off-diagonal distance is positive: pairwise_distances clamps equal rows to 1e-6
    return distances / (distances.sum() / (n * (n - 1)))


class RKDAngle(nn.Module):
    """Angle-wise loss, equations 7 to 9: smooth-L1 between the cosines of all angles (j, i, k) with vertex i.

    The mean runs over all N^3 ordered triples, degenerate ones (cosine 0 where a side has no length) included. By the
    law of cosines the squared distances D hold every angle,

        cos(j, i, k) = (Dij + Dik - Djk) / (2 sqrt(Dij Dik)),

    so neither the N x N x D differences nor the N x N x N cosines of the textbook formula exist: memory is O(N^2).
    A side of no length passes no gradient (the textbook's autograd passes one of order 10^12 there).

    Args (of the call):
        student: (N, Ds) embeddings.
        teacher: (N, Dt) embeddings; no gradient flows to them.
    Returns:
        () loss in the student's type.
    """

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        work = torch.promote_types(student.dtype, torch.float32)
        with torch.no_grad():
            target = squared_distances(teacher).to(work)
        squared = squared_distances(student).to(work)
        loss: Tensor = _AngleLoss.apply(squared, target)
        return loss.to(student.dtype)


class _AngleLoss(torch.autograd.Function):
    """The loss of two (N, N) squared-distance matrices, and its gradient for the first, found in the same sweep."""

    @staticmethod
    def forward(ctx: Any, squared: Tensor, target: Tensor) -> Tensor:
        n = len(squared)
        total = squared.new_zeros((), dtype=torch.float64)
        grad = torch.zeros_like(squared)
        inverse, target_inverse = _inverse_sqrt(squared), _inverse_sqrt(target)
        for i in range(n):
            cosines = _cosines_at(i, squared, inverse)  # (N, N)
            error = cosines - _cosines_at(i, target, target_inverse)
            slope = error.clamp(-1, 1)
            # smooth-L1 is slope * (error - slope / 2) on both of its branches
            total += (slope * (error - slope / 2)).sum(dtype=torch.float64)

            side = inverse[i]
            pull = slope @ side  # (N,)
            grad.addcmul_(slope, torch.outer(side, side), value=-0.5)
            grad[i] += side * pull - (slope * cosines).sum(dim=1) * side.square()
        ctx.save_for_backward(grad / n**3)
        return (total / n**3).to(squared.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        (grad,) = ctx.saved_tensors
        return grad_output * grad, None


def _inverse_sqrt(squared: Tensor) -> Tensor:
    return squared.rsqrt().masked_fill(squared == 0, 0.0)


def _cosines_at(i: int, squared: Tensor, inverse: Tensor) -> Tensor:
    row = squared[i]
    return (row[:, None] + row[None, :] - squared) * torch.outer(inverse[i], inverse[i] / 2)
