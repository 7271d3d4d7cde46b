"""Relational knowledge distillation (Park, Kim, Lu, Cho; CVPR 2019; arXiv 1904.05068)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rkd_cli.geometry import check_rows, in_range, pairwise_distances, squared_distances


class RKDDistance(nn.Module):
    """Distance-wise loss, equations 4 to 6: smooth-L1 between pair distances, each network's divided by their mean mu.

    The loss is the mean over all N^2 ordered pairs, including the zero diagonal. mu is the mean over positive
    distances; the gradient flows through the student's mu.
    """

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of one batch.

        Args:
            student: (N, Ds) embeddings.
            teacher: (N, Dt) embeddings; no gradient flows to them.
        Returns:
            () loss in the student's dtype; 0 for fewer than two rows.
        Raises:
            ValueError: N differs, or a shape or dtype is wrong.
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

    The loss is the mean over all N^3 ordered triples; the cosine is 0 if a side has length 0. Squared distances D give
    every angle by the law of cosines,

        cos(j, i, k) = (Dij + Dik - Djk) / (2 sqrt(Dij Dik)),

    so memory is O(N^2), without N x N x D differences or N x N x N cosines. The sum cancels if one side is much shorter
    than the others, so all of it is float64. A side of length 0 has no gradient (autograd through the textbook formula
    gives one of order 10^12).
    """

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of one batch.

        Args:
            student: (N, Ds) embeddings.
            teacher: (N, Dt) embeddings; no gradient flows to them.
        Returns:
            () loss in the student's dtype.
        Raises:
            ValueError: N differs, or a shape or dtype is wrong.
        """
        check_rows(student, teacher)
        with torch.no_grad():
            target = squared_distances(in_range(teacher))
        # its own statement: inside the call below, torch.compile would recompile on every call
        squared = squared_distances(in_range(student))
        loss: Tensor = _AngleLoss.apply(squared, target)
        return loss.to(student.dtype)


class _AngleLoss(torch.autograd.Function):
    """The loss of two (N, N) squared-distance matrices; the gradient for the first comes from the same loop.

    A block is the cosines at some vertices i, some rows j and the columns k from those rows on: cosines are symmetric
    in j and k, so each is computed once and counted twice. With a = 1 / sqrt(D), or 0 for a side of length 0, and
    n = D a, a cosine is (n_ij a_ik + a_ij n_ik - a_ij a_ik Djk) / 2: an inner product of length 2 and an elementwise
    term. One bmm therefore gives the difference of student and teacher but for the elementwise terms.
    """

    @staticmethod
    def forward(ctx: Any, squared: Tensor, target: Tensor) -> Tensor:
        count = len(squared)
        blocks = list(_blocks(count, squared.device))
        scratch = squared.new_empty(3 * max(_elements(count, *block) for block in blocks))
        a_all, b_all = _inverse_sqrt(squared), _inverse_sqrt(target)
        total = squared.new_zeros(())
        opposite, pulls, swings = torch.zeros_like(squared), torch.zeros_like(squared), torch.zeros_like(squared)
        for i, j in blocks:
            k = slice(j.start, count)
            djk, tjk = squared[j, k], target[j, k]  # (J, K)
            a, b, d = a_all[i], b_all[i], squared[i]  # (I, N)
            n, m = d * a, target[i] * b
            block = scratch[: 3 * len(a) * djk.numel()].view(3, len(a), *djk.shape)  # (3, I, J, K)
            error, slope, weight = block

            left = torch.stack([n[:, j], a[:, j], -m[:, j], -b[:, j]], dim=2)  # (I, J, 4)
            right = torch.stack([a[:, k], n[:, k], b[:, k], m[:, k]], dim=1)  # (I, 4, K)
            torch.baddbmm(error, left, right, beta=0, alpha=0.5, out=error)  # the difference of cosines, so far
            torch.mul(b[:, j, None], b[:, None, k], out=weight)
            error.addcmul_(tjk, weight, value=0.5)
            torch.mul(a[:, j, None], a[:, None, k], out=weight)
            error.addcmul_(djk, weight, value=-0.5)
            torch.clamp(error, -1, 1, out=slope)
            # smooth-L1 is slope * (error - slope / 2) on both of its branches
            error.sub_(slope, alpha=0.5).mul_(slope)
            block[:2, :, :, : len(djk)].mul_(0.5)  # k runs over the rows j too, so these appear twice
            total += error.sum()

            # d cos / dDjk = -a_ij a_ik / 2 and d cos / dDij = a_ij a_ik (1 + a_ij^2 (Djk - Dik)) / 4
            pull = slope.mul_(weight)
            opposite[j, k].add_(pull.sum(dim=0))
            for side, other, dim in ((j, d[:, None, k], 2), (k, d[:, j, None], 1)):
                pulls[i, side].add_(pull.sum(dim))
                swings[i, side].add_(torch.sub(djk, other, out=error).mul_(pull).sum(dim))
        grad = pulls + a_all.square() * swings - 2 * opposite
        ctx.save_for_backward(grad / (2 * count**3))
        return 2 * total / count**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        (grad,) = ctx.saved_tensors
        return grad_output * grad, None


def _blocks(count: int, device: torch.device) -> Iterator[tuple[slice, slice]]:
    """The vertices i and the rows j of each block; its columns k are those from its first row on.

    Fewer rows compute fewer cosines twice; three blocks of 1 MB fit a CPU's caches; a GPU needs few, large kernels:
    of 64 MB, they take longer than their launch, and 4,096 rows make some 4,000 blocks.
    """
    rows, elements = (16, 1 << 17) if device.type == "cpu" else (128, 1 << 23)
    rows = max(1, min(rows, elements // count))
    for top in range(0, count, rows):
        j = slice(top, min(top + rows, count))
        vertices = max(1, elements // ((j.stop - top) * (count - top)))
        for first in range(0, count, vertices):
            yield slice(first, min(first + vertices, count)), j


def _elements(count: int, i: slice, j: slice) -> int:
    elements: int = (i.stop - i.start) * (j.stop - j.start) * (count - j.start)
    return elements


def _inverse_sqrt(squared: Tensor) -> Tensor:
    return squared.rsqrt().masked_fill(squared == 0, 0.0)
