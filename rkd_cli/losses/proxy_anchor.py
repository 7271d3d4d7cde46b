"""The proxy-anchor loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rkd_cli.losses.softmax import cosines_to


class ProxyAnchor(nn.Module):
    """Proxy-anchor loss (Kim et al., CVPR 2020; arXiv 2003.13911, equation 4).

    Every class has a learned proxy p, the anchor of all rows x of the batch. With cosines s, and P+ the proxies of the
    classes that the batch holds:

        1/|P+| sum_P+ log(1 + sum_{x of p} exp(-alpha (s(x, p) - margin)))
        + 1/C sum_p log(1 + sum_{x not of p} exp(alpha (s(x, p) + margin))).

    The paper sets alpha 32 and margin 0.1. ``proxies`` start as its released code draws them, normal with variance 2/C
    (He's of the fan out), and learn a hundred times as fast as the network there.

    Args:
        classes: C.
        size: D of the embeddings.
        alpha: sharpness.
        margin: added to the cosine of a negative and taken from that of a positive.
    """

    def __init__(self, classes: int, size: int, alpha: float = 32.0, margin: float = 0.1) -> None:
        super().__init__()
        self.alpha, self.margin = alpha, margin
        self.proxies = nn.Parameter(torch.empty(classes, size))
        nn.init.kaiming_normal_(self.proxies, mode="fan_out")

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of one batch.

        Args:
            embeddings: (N, D), any floating type and any length.
            labels: (N,) int64 positions of classes, 0 to C - 1.
        Returns:
            () loss in the embeddings' type.
        Raises:
            ValueError: not (N, D) embeddings and the (N,) labels of the same N images, or another D.
        """
        cosines = cosines_to(self.proxies, embeddings, labels)  # (N, C)
        own = F.one_hot(labels, len(self.proxies)).bool()
        attract = _log_one_plus_sum(-self.alpha * (cosines - self.margin), own)
        repel = _log_one_plus_sum(self.alpha * (cosines + self.margin), ~own)
        present = own.any(dim=0).sum()  # the others attract log 1 = 0
        return (attract.sum() / present + repel.mean()).to(embeddings.dtype)


def _log_one_plus_sum(exponents: Tensor, kept: Tensor) -> Tensor:
    """(C,) log(1 + sum exp) over the kept entries of each column."""
    return F.pad(exponents.masked_fill(~kept, -torch.inf), (0, 0, 1, 0)).logsumexp(dim=0)
