"""Relational knowledge distillation (Park, Kim, Lu, Cho; CVPR 2019; arXiv 1904.05068)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rkd_cli.geometry import check_rows, in_range, pairwise_distances, squared_distances


class RKDDistance(nn.Module):
    """Distance-wise loss, equations 4 to 6: smooth-L1 between pair distances, each set divided by its own mean.

    The mean of the loss runs over all N^2 ordered pairs, the zero diagonal included; the unit mu is the mean over
    positive distances, and the student's mu is part of the gradient.
    """

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of one batch.

        Args:
            student: (N, Ds) embeddings.
            teacher: (N, Dt) embeddings; no gradient flows to them.
        Returns:
            () loss in the student's type; 0 for fewer than two rows.
        Raises:
            ValueError: the two are not embeddings of the same N images.
        """
        check_rows(student, teacher)
        if len(student) < 2:
            return student.sum() * 0
        with torch.no_grad():
            target = _in_mean_units(pairwise_distances(in_range(teacher)))
        return F.smooth_l1_loss(_in_mean_units(pairwise_distances(in_range(student))), target).to(student.dtype)


def _in_mean_units(distances: Tensor) -> Tensor:
    n = len(distances)  # every off-diagonal distance is positive: pairwise_distances clamps equal rows to 1e-6
    return distances / (distances.sum() / (n * (n - 1)))


class RKDAngle(nn.Module):
    """Angle-wise loss, equations 7 to 9: smooth-L1 between the cosines of all angles (j, i, k) with vertex i.

    The mean runs over all N^3 ordered triples, degenerate ones (cosine 0 where a side has no length) included. By the
    law of cosines the squared distances D hold every angle,

        cos(j, i, k) = (Dij + Dik - Djk) / (2 sqrt(Dij Dik)),

    so neither the N x N x D differences nor the N x N x N cosines of the textbook formula exist: memory is O(N^2).
    The sum cancels where a side is short beside the others, so all of it is float64. A side of no length passes no
    gradient (the textbook's autograd passes one of order 10^12 there).
    """

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of one batch.

        Args:
            student: (N, Ds) embeddings.
            teacher: (N, Dt) embeddings; no gradient flows to them.
        Returns:
            () loss in the student's type.
        Raises:
            ValueError: the two are not embeddings of the same N images.
        """
        check_rows(student, teacher)
        with torch.no_grad():
            target = squared_distances(in_range(teacher))
        squared = squared_distances(
            in_range(student)
        )  # on a line of its own: else torch.compile compiles anew with every call
        loss: Tensor = _AngleLoss.apply(squared, target)
        return loss.to(student.dtype)


class _AngleLoss(torch.autograd.Function):
    """The loss of two (N, N) squared-distance matrices, and its gradient for the first, found in the same sweep.

    The cosines at some vertices i, some rows j and the columns k from those rows on fill one block at a time: cosines
    are symmetric in j and k, so each is found once and counts twice. With a = 1 / sqrt(D), or 0 for a side of no
    length, and n = D a, a cosine is (n_ij a_ik + a_ij n_ik - a_ij a_ik Djk) / 2: an inner product of length 2, and one
    elementwise term. So is the teacher's, and their difference needs one pass for all four products.
    """

    @staticmethod
    def forward(ctx: Any, squared: Tensor, target: Tensor) -> Tensor:
        count = len(squared)
        rows, elements = _block(count, squared.device)
        scratch = squared.new_empty(3 * elements)
        a_all, b_all = _inverse_sqrt(squared), _inverse_sqrt(target)
        total = squared.new_zeros(())
        opposite, pulls, swings = torch.zeros_like(squared), torch.zeros_like(squared), torch.zeros_like(squared)
        for top in range(0, count, rows):
            j, k = slice(top, top + rows), slice(top, count)
            djk, tjk = squared[j, k], target[j, k]  # (J, K)
            vertices = max(1, elements // djk.numel())
            for first in range(0, count, vertices):
                i = slice(first, first + vertices)
                a, b, d = a_all[i], b_all[i], squared[i]  # (I, N)
                n, m = d * a, target[i] * b
                block = scratch[: 3 * len(a) * djk.numel()].view(3, len(a), *djk.shape)  # (3, I, J, K)
                error, slope, weight = block

                left = torch.stack([n[:, j], a[:, j], -m[:, j], -b[:, j]], dim=2)  # (I, J, 4)
                right = torch.stack([a[:, k], n[:, k], b[:, k], m[:, k]], dim=1)  # (I, 4, K)
                torch.bmm(left, right, out=error)  # twice the difference of cosines, so far
                torch.mul(b[:, j, None], b[:, None, k], out=weight)
                error.addcmul_(tjk, weight)
                torch.mul(a[:, j, None], a[:, None, k], out=weight)
                error.addcmul_(djk, weight, value=-1).mul_(0.5)
                torch.clamp(error, -1, 1, out=slope)
                # smooth-L1 is slope * (error - slope / 2) on both of its branches
                error.sub_(slope, alpha=0.5).mul_(slope)
                block[:2, :, :, : len(djk)] *= 0.5  # here k runs over the rows j too, so these come twice
                total += error.sum()

                # d cos / dDjk = -a_ij a_ik / 2 and d cos / dDij = a_ij a_ik (1 + a_ij^2 (Djk - Dik)) / 4
                pull = slope.mul_(weight)
                opposite[j, k] += pull.sum(dim=0)
                for side, other, dim in ((j, d[:, None, k], 2), (k, d[:, j, None], 1)):
                    pulls[i, side] += pull.sum(dim)
                    swings[i, side] += torch.sub(djk, other, out=error).mul_(pull).sum(dim)
        grad = pulls + a_all.square() * swings - 2 * opposite
        ctx.save_for_backward(grad / (2 * count**3))
        return 2 * total / count**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        (grad,) = ctx.saved_tensors
        return grad_output * grad, None


def _block(count: int, device: torch.device) -> tuple[int, int]:
    """How many rows a block has, and elements at most: few rows find the fewest cosines twice, three blocks of 1 MB
    stay in a CPU's caches, and a GPU wants few and large kernels."""
    rows, elements = (16, 1 << 17) if device.type == "cpu" else (128, 1 << 20)
    rows = max(1, min(rows, elements // count))
    return rows, rows * count * max(1, min(count, elements // (rows * count)))


def _inverse_sqrt(squared: Tensor) -> Tensor:
    return squared.rsqrt().masked_fill(squared == 0, 0.0)
