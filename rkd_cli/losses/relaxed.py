"""The relaxed contrastive loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rkd_cli.geometry import check_rows, in_range, squared_distances, unit_rows


class RelaxedContrastive(nn.Module):
    """Relaxed contrastive loss (Kim et al., CVPR 2021; arXiv 2103.14845, equation 4).

    The contrastive loss with the teacher's similarity w_ij = exp(-||t_i - t_j||^2 / sigma) of unit-length embeddings
    instead of the label. d_ij is the student's distance divided by the mean of its row, over all N entries:

        1/N sum_ij  w_ij d_ij^2 + (1 - w_ij) max(0, delta - d_ij)^2,   over all pairs with positive distance.

    The paper and its code (https://github.com/tjddus9597/LabelRelaxation-CVPR21) set sigma and delta to 1.

    Args:
        sigma: width of the teacher's similarity.
        delta: margin, in mean distances.
    """

    def __init__(self, sigma: float = 1, delta: float = 1) -> None:
        super().__init__()
        self.sigma, self.delta = sigma, delta

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of one batch.

        Args:
            student: (N, Ds) embeddings.
            teacher: (N, Dt) embeddings; no gradient flows to them.
        Returns:
            () loss in the student's dtype; equal rows have no gradient.
        Raises:
            ValueError: N differs, or a shape or dtype is wrong.
        """
        check_rows(student, teacher)
        with torch.no_grad():
            weights = (-squared_distances(unit_rows(teacher)) / self.sigma).exp()
        squared = squared_distances(in_range(student))
        apart = squared != 0  # true of NaN
        distances = squared.masked_fill(~apart, 1.0).sqrt() * apart  # the gradient of sqrt is infinite at 0
        means = distances.mean(dim=1, keepdim=True)
        distances = distances / means.masked_fill(means == 0, 1.0)
        attract = weights * distances.square()
        repel = (1 - weights) * (self.delta - distances).relu().square()
        return (((attract + repel) * apart).sum() / len(student)).to(student.dtype)
