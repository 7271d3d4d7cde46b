"""The multi-similarity loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rkd_cli.geometry import check_rows, unit_rows


class MultiSimilarity(nn.Module):
    """Multi-similarity loss with its own pair mining (Wang et al., CVPR 2019; arXiv 1904.06627).

    For an anchor i with cosines S, the mined pairs are

        Pi: the positives j with S_ij < max_k S_ik + epsilon, over its negatives k,
        Ni: the negatives j with S_ij > min_k S_ik - epsilon, over its positives k,

    either both empty or neither. The loss is the mean over all N anchors, including those without mined pairs, of

        1/alpha log(1 + sum_Pi exp(-alpha (S_ij - base))) + 1/beta log(1 + sum_Ni exp(beta (S_ij - base))).

    The paper sets alpha 2, beta 50, base (its lambda) 1 and epsilon 0.1. The default base is 0.5 instead, as in the
    authors' code (https://github.com/msight-tech/research-ms-loss, ``thresh`` in ``losses/multi_similarity_loss.py``)
    and in PyTorch Metric Learning: networks learn far less with 1. That code also ignores positives at a cosine of 1,
    duplicates of the anchor; here, as in the paper, they are positives.

    Args:
        alpha: sharpness for positives.
        beta: sharpness for negatives.
        base: the cosine around which positives and negatives start to count.
        epsilon: margin of the mining; with 2 or more, every pair of an anchor that has both kinds is mined.
    """

    def __init__(self, alpha: float = 2.0, beta: float = 50.0, base: float = 0.5, epsilon: float = 0.1) -> None:
        super().__init__()
        self.alpha, self.beta, self.base, self.epsilon = alpha, beta, base, epsilon

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of one batch.

        Args:
            embeddings: (N, D), any floating dtype and any norm.
            labels: (N,) integers.
        Returns:
            () loss in the embeddings' dtype; 0 with zero gradient if no pair is mined.
        Raises:
            ValueError: N differs, or a shape or dtype is wrong.
        """
        check_rows(embeddings, labels=labels)
        labels = labels.to(embeddings.device, non_blocking=True)
        unit = unit_rows(embeddings)
        cosines = unit @ unit.T
        same = labels[:, None] == labels
        positives = same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
        with torch.no_grad():
            nearest_negative = cosines.masked_fill(same, -torch.inf).amax(dim=1, keepdim=True)
            farthest_positive = cosines.masked_fill(~positives, torch.inf).amin(dim=1, keepdim=True)
            mined_positives = positives & (cosines < nearest_negative + self.epsilon)
            mined_negatives = ~same & (cosines > farthest_positive - self.epsilon)
        attract = _log_one_plus_sum(-self.alpha * (cosines - self.base), mined_positives) / self.alpha
        repel = _log_one_plus_sum(self.beta * (cosines - self.base), mined_negatives) / self.beta
        return (attract + repel).mean().to(embeddings.dtype)


def _log_one_plus_sum(exponents: Tensor, mask: Tensor) -> Tensor:
    """(N,) log(1 + sum exp) over the masked entries of each row; NaN if the diagonal entry is."""
    one = 0 * exponents.diagonal()[:, None]
    return torch.cat([one, exponents.masked_fill(~mask, -torch.inf)], dim=1).logsumexp(dim=1)
