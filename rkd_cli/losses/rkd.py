"""Relational knowledge distillation (Park, Kim, Lu, Cho; CVPR 2019; arXiv 1904.05068)."""

from __future__ import annotations

from itertools import product
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
        work = torch.promote_types(student.dtype, torch.float32)
        with torch.no_grad():
            target = _in_mean_units(pairwise_distances(teacher).to(work))
        distances = _in_mean_units(pairwise_distances(student).to(work))
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
        with torch.autocast(student.device.type, enabled=False):
            loss: Tensor = _AngleLoss.apply(squared, target)
        return loss.to(student.dtype)


class _AngleLoss(torch.autograd.Function):
    """The loss of two (N, N) squared-distance matrices, and its gradient for the first, found in the same sweep.

    The cosines at some vertices i and rows j fill one block at a time. With a = 1 / sqrt(D), or 0 for a side of no
    length, and n = D a, a cosine is (n_ij a_ik + a_ij n_ik - a_ij a_ik Djk) / 2: an inner product of length 2, and one
    elementwise term. So is the teacher's, and their difference needs one pass for all four products.
    """

    @staticmethod
    def forward(ctx: Any, squared: Tensor, target: Tensor) -> Tensor:
        count = len(squared)
        vertices, rows = _block(count, squared.device)
        scratch = squared.new_empty(3, vertices * rows * count)
        total = squared.new_zeros((), dtype=torch.float64)
        grad = torch.zeros_like(squared)
        inverse, target_inverse = _inverse_sqrt(squared), _inverse_sqrt(target)
        for top, first in product(range(0, count, rows), range(0, count, vertices)):
            j, i = slice(top, top + rows), slice(first, first + vertices)
            a, b, d = inverse[i], target_inverse[i], squared[i]  # (B, N)
            n, m = d * a, target[i] * b
            height = len(squared[j])
            error, weight, slope = scratch[:, : len(a) * height * count].view(3, len(a), height, count)  # (B, J, N)

            left = torch.stack([n, a, -m, -b], dim=2)[:, j]  # (B, J, 4)
            torch.bmm(left, torch.stack([a, n, b, m], dim=1), out=error)  # twice the difference of cosines, so far
            torch.mul(b[:, j, None], b[:, None], out=weight)
            error.addcmul_(target[j], weight)
            torch.mul(a[:, j, None], a[:, None], out=weight)
            error.addcmul_(squared[j], weight, value=-1).div_(2)
            torch.clamp(error, -1, 1, out=slope)
            # smooth-L1 is slope * (error - slope / 2) on both of its branches
            total += error.sub_(slope, alpha=0.5).mul_(slope).sum()

            # d cos / dDjk = -a_ij a_ik / 2 and d cos / dDij = (a_ij a_ik - a_ij^2 cos) / 2; j and k may change places
            pull = slope.mul_(weight)
            grad[j] -= pull.sum(dim=0)
            sums = torch.bmm(torch.stack([torch.ones_like(d), d], dim=1)[:, :, j], pull)  # (B, 2, N)
            grad[i] += sums[:, 0] - a.square() * sums[:, 1]
            grad[i, j] += a[:, j].square() * torch.mul(pull, squared[j], out=weight).sum(dim=2)
        ctx.save_for_backward(grad / (2 * count**3))
        return (total / count**3).to(squared.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        (grad,) = ctx.saved_tensors
        return grad_output * grad, None


def _block(count: int, device: torch.device) -> tuple[int, int]:
    """How many vertices and rows a block has: three of its size fit a CPU's second-level cache, while a GPU wants few
    and large kernels."""
    least, most = (1 << 17, 1 << 18) if device.type == "cpu" else (1 << 24, 1 << 24)  # elements
    rows = min(count, max(1, most // count))
    return min(count, max(1, least // (rows * count))), rows


def _inverse_sqrt(squared: Tensor) -> Tensor:
    return squared.rsqrt().masked_fill(squared == 0, 0.0)
