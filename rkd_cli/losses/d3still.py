"""Decoupled differential distillation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rkd_cli.losses.teacher_space import TeacherQueue, unit_pair

_PAIR_ELEMENTS = 1 << 16  # pairs of neighbors at once: half a megabyte in float64, which a CPU's caches keep


class D3still(nn.Module):
    """Decoupled differential distillation, after D3still (Xie et al., CVPR 2024).

    Not each similarity is learned but the differences that make the ranking. With cosines s_ij of student i and t_ij of
    teacher i to row j of the teacher's gallery, over pairs (j, k) of the K nearest neighbors of i, itself left out,

        e_ijk = ((s_ij - s_ik) - (t_ij - t_ik)) / (0.1 + |t_ij - t_ik|)

    is parted by whether the student has j and k in the teacher's order; the loss is the sum of

        feature      / N        sqrt(sum_i (t_ii - s_ii)^2)                                     the embedding itself,
        inconsistent / (N K)    sum_i sqrt(sum_jk e_ijk^2  where (s_ij - s_ik)(t_ij - t_ik) < 0)   pairs to turn,
        consistent   / (N K)    sum_i sqrt(sum_jk e_ijk^2  where (s_ij - s_ik)(t_ij - t_ik) > 0)   pairs in order.

    The terms, the 0.1 and these norms are those of the authors' code (https://github.com/SCY-X/D3still,
    ``AIR_Distiller/distillers/D3.py``); the text of the paper was not at hand, and its equations may differ. The
    defaults are its configuration of ResNet18 students on CUB-200-2011, In-Shop and SOP: TOPK 10, which counts the
    image itself, ALPHA 100, BETA 5, GAMMA 1, and a gallery of the batch alone, which has 256 images there. MobileNetV3
    students have 200, 10 and 2. A tie of either network is no pair.

    Args:
        neighbors: K; a smaller gallery gives all of its rows.
        feature: weight of the first term.
        inconsistent: weight of the pairs in the wrong order.
        consistent: weight of the pairs in the teacher's order.
        queue_size: number of past teacher embeddings in the gallery beside the batch; each batch is pushed after its
            loss, in training mode only.
        size: D; without it, that of the first batch.
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
            () loss in the student's type; memory is that of (N, M) similarities to a gallery of M, whatever K.
        Raises:
            ValueError: not embeddings of the same N images, sizes that differ, or are not the queue's.
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
    """The weighted norms of (N, K) similarities' relative errors, summed, and the gradient found in the same sweep.

    Of the N K^2 pairs those of a few rows exist at a time. An error is antisymmetric in its pair, so each similarity
    takes twice the sum over the pairs that it is the first of.
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
                kept = error * part
                norm = torch.linalg.vector_norm(kept, dim=(1, 2))
                total += weight * norm.sum()
                pull = kept.mul_(scale).sum(dim=2)
                grad[i] += 2 * weight * pull / norm.masked_fill(norm == 0, 1.0)[:, None]
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None, None]:
        (grad,) = ctx.saved_tensors
        return grad_output * grad, None, None, None, None
