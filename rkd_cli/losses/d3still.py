"""Decoupled differential distillation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rkd_cli.losses.teacher_space import TeacherQueue, unit_pair

_PAIR_ELEMENTS = 1 << 16  # pairs of neighbors at once: half a megabyte in float64 fits a CPU's caches


class D3still(nn.Module):
    """Decoupled differential distillation, after D3still (Xie et al., CVPR 2024).

    The student learns differences of similarities, which decide the ranking. With cosines s_ij of student i and t_ij of
    teacher i to row j of the teacher's gallery, over pairs (j, k) of the K nearest neighbors of i without itself,

        e_ijk = ((s_ij - s_ik) - (t_ij - t_ik)) / (0.1 + |t_ij - t_ik|)

    is split by whether the student ranks j and k as the teacher does. The loss is the sum of

        feature      / N        sqrt(sum_i (t_ii - s_ii)^2)                                     the embedding itself,
        inconsistent / (N K)    sum_i sqrt(sum_jk e_ijk^2  where (s_ij - s_ik)(t_ij - t_ik) < 0)   pairs out of order,
        consistent   / (N K)    sum_i sqrt(sum_jk e_ijk^2  where (s_ij - s_ik)(t_ij - t_ik) > 0)   pairs in order.

    The terms, the 0.1 and these norms follow the authors' code (https://github.com/SCY-X/D3still,
    ``AIR_Distiller/distillers/D3.py``), not the text of the paper, whose equations may differ. The defaults are its
    configuration of ResNet18 students on CUB-200-2011, In-Shop and SOP: TOPK 10 (which counts the image itself),
    ALPHA 100, BETA 5, GAMMA 1, and a gallery of one batch of 256 images. For MobileNetV3 students it sets ALPHA 200,
    BETA 10, GAMMA 2. A tie in either network is not a pair.

    Args:
        neighbors: K; a smaller gallery is used whole.
        feature: weight of the first term.
        inconsistent: weight of the pairs in the wrong order.
        consistent: weight of the pairs in the teacher's order.
        queue_size: number of past teacher embeddings in the gallery, in addition to the batch. Each batch is pushed
            after its loss, in training mode only.
        size: D; by default that of the first batch.
    """

    offset = 0.1

    def __init__(
        self,
        neighbors: int = 9,
        feature: float = 100.0,
        inconsistent: float = 5.0,
        consistent: float = 1.0,
        queue_size: int = 0,
        size: int | None = None,
    ) -> None:
        super().__init__()
        self.neighbors = neighbors
        self.feature, self.inconsistent, self.consistent = feature, inconsistent, consistent
        self.queue = TeacherQueue(queue_size, size)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of one batch.

        Args:
            student: (N, D) embeddings.
            teacher: (N, D) embeddings; no gradient flows to them.
        Returns:
            () loss in the student's dtype. Memory is O(N M) for a gallery of M rows, for any K.
        Raises:
            ValueError: N or D differ, or D is not the queue's.
        """
        query, target = unit_pair(student, teacher)
        gallery = self.queue.behind(target)  # (M, D)
        s, t = query @ gallery.T, target @ gallery.T  # (N, M)
        own = torch.eye(*t.shape, dtype=torch.bool, device=t.device)
        nearest = t.masked_fill(own, -torch.inf).topk(min(self.neighbors, len(gallery) - 1)).indices
        pairs: Tensor = _PairErrors.apply(
            s.gather(1, nearest), t.gather(1, nearest), self.offset, self.inconsistent, self.consistent
        )
        feature: Tensor = torch.linalg.vector_norm(t.diagonal() - s.diagonal())
        if self.training:
            self.queue.push(target)
        return ((self.feature * feature + pairs / max(1, nearest.shape[1])) / len(t)).to(student.dtype)


class _PairErrors(torch.autograd.Function):
    """Sum of the weighted norms of the relative errors of (N, K) similarities; the gradient comes from the same loop.

    Pairs are computed for a few rows at a time. An error is antisymmetric in its pair, so the gradient of a similarity
    is twice the sum over the pairs in which it comes first.
    """

    @staticmethod
    def forward(ctx: Any, s: Tensor, t: Tensor, offset: float, inconsistent: float, consistent: float) -> Tensor:
        total, grad = s.new_zeros(()), torch.zeros_like(s)
        rows = max(1, _PAIR_ELEMENTS // max(1, s.shape[1]) ** 2)
        for first in range(0, len(s), rows):
            i = slice(first, first + rows)
            learned, target = (x[i, :, None] - x[i, None, :] for x in (s, t))  # (B, K, K)
            scale = (offset + target.abs()).reciprocal_()
            error, order = (learned - target).mul_(scale), learned.mul_(target)
            for weight, part in ((inconsistent, order < 0), (consistent, order > 0)):
                selected = error * part
                norm = torch.linalg.vector_norm(selected, dim=(1, 2))
                total += weight * norm.sum()
                pull = selected.mul_(scale).sum(dim=2)
                grad[i] += 2 * weight * pull / norm.masked_fill(norm == 0, 1.0)[:, None]
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None, None]:
        (grad,) = ctx.saved_tensors
        return grad_output * grad, None, None, None, None
