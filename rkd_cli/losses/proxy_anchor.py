"""The proxy-anchor loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rkd_cli.losses.softmax import cosines_to


class ProxyAnchor(nn.Module):
    """Proxy-anchor loss (Kim et al., CVPR 2020; arXiv 2003.13911, equation 4).

    Every class has a learned proxy p, the anchor for all rows x of the batch. With cosines s, and P+ the proxies of the
    classes in the batch:

        1/|P+| sum_P+ log(1 + sum_{x of p} exp(-alpha (s(x, p) - margin)))
        + 1/C sum_p log(1 + sum_{x not of p} exp(alpha (s(x, p) + margin))).

    The paper sets alpha 32 and margin 0.1. ``proxies`` are initialized as in its released code, normal with variance
    2/C (He, fan out); there their learning rate is 100 times that of the network.

    Args:
        classes: C.
        size: D of the embeddings.
        alpha: sharpness.
        margin: added to the cosine of a negative, subtracted from that of a positive.
    """

    def __init__(self, classes: int, size: int, alpha: float = 32.0, margin: float = 0.1) -> None:
        super().__init__()
        self.alpha, self.margin = alpha, margin
        self.proxies = nn.Parameter(torch.empty(classes, size))
        nn.init.kaiming_normal_(self.proxies, mode="fan_out")

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of one batch.

        Args:
            embeddings: (N, D), any floating dtype and any norm.
            labels: (N,) int64 class indices, 0 to C - 1.
        Returns:
            () loss in the embeddings' dtype.
        Raises:
            ValueError: N differs, or D is not that of the proxies.
        """
        cosines = cosines_to(self.proxies, embeddings, labels)  # (N, C)
        labels = labels.to(cosines.device, non_blocking=True)
        own = F.one_hot(labels, len(self.proxies)).bool()
        attract = _log_one_plus_sum(-self.alpha * (cosines - self.margin), own)
        repel = _log_one_plus_sum(self.alpha * (cosines + self.margin), ~own)
        present = own.any(dim=0).sum()  # the others attract log 1 = 0
        return (attract.sum() / present + repel.mean()).to(embeddings.dtype)


def _log_one_plus_sum(exponents: Tensor, mask: Tensor) -> Tensor:
    """(C,) log(1 + sum exp) over the masked entries of each column."""
    return F.pad(exponents.masked_fill(~mask, -torch.inf), (0, 0, 1, 0)).logsumexp(dim=0)
