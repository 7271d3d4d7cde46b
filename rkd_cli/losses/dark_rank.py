"""DarkRank (Chen, Wang, Zhang; AAAI 2018; arXiv 1707.01220), the hard variant."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rkd_cli.geometry import check_rows, in_range, pairwise_distances


class HardDarkRank(nn.Module):
    """Likelihood of the teacher's ranking of each row's nearest neighbors under the student's distances.

    With scores S = -alpha d^beta (equation 6), the teacher's order pi of its ``permute_len`` nearest neighbors has the
    Plackett-Luce probability prod_i exp S_pi(i) / sum_{j >= i} exp S_pi(j) (equations 8, 10). The loss is the mean
    over the rows of its negative logarithm. The defaults are those of the class in the published RKD code; its script
    ``run_distill.py`` sets alpha to 2.

    Args:
        alpha: scale of the distance.
        beta: exponent of the distance.
        permute_len: length of the ranked list; a smaller batch is ranked whole.
    """

    def __init__(self, alpha: float = 3, beta: float = 3, permute_len: int = 4) -> None:
        super().__init__()
        self.alpha, self.beta, self.permute_len = alpha, beta, permute_len

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
        length = min(self.permute_len, len(student) - 1)
        if length < 1:
            return student.sum() * 0
        with torch.no_grad():
            own = torch.eye(len(teacher), dtype=torch.bool, device=teacher.device)
            nearest = pairwise_distances(in_range(teacher)).masked_fill(own, torch.inf).topk(length, largest=False)
        scores = -self.alpha * pairwise_distances(student).pow(self.beta)
        ranked = scores.gather(1, nearest.indices)  # (N, length), in the teacher's order
        ranked = ranked + 0 * nearest.values  # passes a NaN distance of the teacher on to the loss
        rest = ranked.flip(1).logcumsumexp(dim=1).flip(1)
        return (rest - ranked).sum(dim=1).mean().to(student.dtype)
