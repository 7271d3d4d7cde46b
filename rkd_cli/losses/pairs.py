"""Losses on triplets that a miner picks from a labelled batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from rkd_cli.geometry import check_rows, squared_distances
from rkd_cli.mining import DistanceWeighted

Miner = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]

# F.pairwise_distance adds this to every coordinate of a difference; the published results depend on it.
_EPS = 1e-6


def _distances(embeddings: Tensor, p: float) -> Tensor:
    """(N, N) p-norm distances of xi to xj - eps, each pair computed once for all triplets."""
    wide = embeddings.double()
    if p == 2:
        sums = wide.sum(dim=1)
        # ||xi - xj + eps||^2, term by term
        squared = squared_distances(embeddings) + 2 * _EPS * (sums[:, None] - sums) + wide.shape[1] * _EPS**2
        distances = squared.clamp(min=torch.finfo(squared.dtype).tiny).sqrt()
    else:
        wide = wide - wide.mean(dim=0)  # spreads one NaN to every distance, as squared_distances does
        distances = torch.cdist(wide, wide - _EPS, p=p)
    return distances.to(torch.promote_types(embeddings.dtype, torch.float32))


class TripletLoss(nn.Module):
    """Mean over the mined triplets of max(0, d(anchor, positive) - d(anchor, negative) + margin).

    Schroff et al., CVPR 2015, with plain (not squared) p-norm distances as in the published RKD experiments
    (https://github.com/lenscloth/RKD, ``metric/loss.py``). Both set the margin to 0.2.

    Args:
        p: norm of the distance, 2 or 1.
        margin: in units of that distance.
        miner: picks (anchor, positive, negative) indices, see ``rkd_cli.mining``; by default ``DistanceWeighted()``.
    """

    def __init__(self, p: float = 2, margin: float = 0.2, miner: Miner | None = None) -> None:
        super().__init__()
        self.p, self.margin, self.miner = p, margin, miner or DistanceWeighted()

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of one batch.

        Args:
            embeddings: (N, D), any floating dtype.
            labels: (N,) integers; on the CPU, a GPU is not synchronized.
        Returns:
            () loss in the embeddings' dtype; 0 with zero gradient if no triplet is mined.
        Raises:
            ValueError: N differs, or a shape or dtype is wrong.
        """
        check_rows(embeddings, labels=labels)
        anchor, positive, negative = self.miner(embeddings, labels)
        if len(anchor) == 0:
            return embeddings.sum() * 0
        d = _distances(embeddings, self.p)
        return (d[anchor, positive] - d[anchor, negative] + self.margin).relu().mean().to(embeddings.dtype)


class ContrastiveLoss(nn.Module):
    """Mean over the mined pairs, positive and negative alike, of d^2 and of max(0, margin - d)^2.

    Hadsell et al., CVPR 2006, on the pairs (anchor, positive) and (anchor, negative) of every mined triplet. The
    default margin is that of the published RKD experiments; PyTorch Metric Learning uses 1.

    Args:
        margin: Euclidean distance beyond which a negative costs nothing.
        miner: picks (anchor, positive, negative) indices, see ``rkd_cli.mining``; by default ``DistanceWeighted()``.
    """

    def __init__(self, margin: float = 0.2, miner: Miner | None = None) -> None:
        super().__init__()
        self.margin, self.miner = margin, miner or DistanceWeighted()

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of one batch.

        Args:
            embeddings: (N, D), any floating dtype.
            labels: (N,) integers; on the CPU, a GPU is not synchronized.
        Returns:
            () loss in the embeddings' dtype; 0 with zero gradient if no triplet is mined.
        Raises:
            ValueError: N differs, or a shape or dtype is wrong.
        """
        check_rows(embeddings, labels=labels)
        anchor, positive, negative = self.miner(embeddings, labels)
        if len(anchor) == 0:
            return embeddings.sum() * 0
        d = _distances(embeddings, 2)
        attract = d[anchor, positive].square()
        repel = (self.margin - d[anchor, negative]).relu().square()
        return torch.cat([attract, repel]).mean().to(embeddings.dtype)
