"""Probabilistic knowledge transfer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rkd_cli.geometry import check_rows, in_range


class PKT(nn.Module):
    """Probabilistic knowledge transfer (Passalis, Tefas; ECCV 2018; arXiv 1803.10837, equations 6 to 8).

    Each row of cosines, mapped to (1 + cos) / 2 and divided by its sum, is a conditional distribution p. The loss is
    the mean of p_teacher log(p_teacher / p_student) over all N^2 entries.
    """

    eps = 1e-7

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
            target = self._probabilities(teacher)
        learned = self._probabilities(student)
        return (target * ((target + self.eps) / (learned + self.eps)).log()).mean().to(student.dtype)

    def _probabilities(self, x: Tensor) -> Tensor:
        x = in_range(x).double()
        # torch gives the norm a gradient of 0 at 0; eps keeps the division finite for rows of zeros
        x = x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + self.eps)
        similarities = (x @ x.T + 1) / 2  # (N, N)
        return similarities / (similarities.sum(dim=1, keepdim=True) + self.eps)
