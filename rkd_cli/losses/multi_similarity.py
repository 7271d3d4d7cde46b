"""The multi-similarity loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rkd_cli.geometry import check_rows, unit_rows


class MultiSimilarity(nn.Module):
    """Multi-similarity loss with its own pair mining (Wang et al., CVPR 2019; arXiv 1904.06627).

    Of an anchor i with cosines S, the mined pairs are

        Pi: the positives j with S_ij < max_k S_ik + epsilon, over its negatives k,
        Ni: the negatives j with S_ij > min_k S_ik - epsilon, over its positives k,

    both empty or neither, and the loss is the mean over all N anchors, those without mined pairs included, of

        1/alpha log(1 + sum_Pi exp(-alpha (S_ij - base))) + 1/beta log(1 + sum_Ni exp(beta (S_ij - base))).

    The paper sets alpha 2, beta 50, base (its lambda) 1 and epsilon 0.1. The base is 0.5 in the authors'
    code (https://github.com/msight-tech/research-ms-loss, ``thresh`` in ``losses/multi_similarity_loss.py``) and in
    PyTorch Metric Learning, and so it is here: with 1 far less is learned. That code also leaves out positives at a
    cosine of 1, duplicates of the anchor; here, as in the paper, they are positives.

    Args:
        alpha: sharpness of the positives.
        beta: sharpness of the negatives.
        base: the cosine where the pull of a positive and the push of a negative set in.
        epsilon: margin of the mining; 2 or more mines every pair of an anchor that has both kinds.
    """

    def __init__(self, alpha: float = 2.0, beta: float = 50.0, base: float = 0.5, epsilon: float = 0.1) -> None:
        super().__init__()
        self.alpha, self.beta, self.base, self.epsilon = alpha, beta, base, epsilon

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of one batch.

        Args:
            embeddings: (N, D), any floating type and any length.
            labels: (N,) integers.
        Returns:
            () loss in the embeddings' type; 0 with zero gradient where no pair is mined.
        Raises:
            ValueError: not (N, D) embeddings and the (N,) labels of the same N images.
        """
        check_rows(embeddings, labels=labels)
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


def _log_one_plus_sum(exponents: Tensor, kept: Tensor) -> Tensor:
    """(N,) log(1 + sum exp) over the kept entries of each row; NaN where the row's own entry is."""
    one = 0 * exponents.diagonal()[:, None]
    return torch.cat([one, exponents.masked_fill(~kept, -torch.inf)], dim=1).logsumexp(dim=1)
