"""Classification losses on the cosines to learned class weights, ``proxies``, without bias."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rkd_cli.geometry import check_rows, unit_rows


def _linear_init(classes: int, size: int) -> nn.Parameter:
    """(C, D) weights with torch's initialization of a linear layer: uniform in +-1/sqrt(D)."""
    bound = 1 / math.sqrt(size)
    return nn.Parameter(torch.empty(classes, size).uniform_(-bound, bound))


def cosines_to(proxies: Tensor, embeddings: Tensor, labels: Tensor) -> Tensor:
    """(N, C) cosines in float64 of (N, D) embeddings to (C, D) proxies; the (N,) labels are only checked."""
    check_rows(embeddings, labels=labels)
    if embeddings.shape[1] != proxies.shape[1]:
        raise ValueError(
            f"need embeddings and proxies with equal D, got {tuple(embeddings.shape)} and {tuple(proxies.shape)}"
        )
    return unit_rows(embeddings) @ unit_rows(proxies).T


class NormalizedSoftmax(nn.Module):
    """Cross-entropy of the cosines to the class weights, divided by a temperature.

    Zhai, Wu; BMVC 2019 (Classification is a strong baseline for deep metric learning); arXiv 1811.12649. The paper
    sets the temperature to 0.05.

    Args:
        classes: C.
        size: D of the embeddings.
        temperature: divides the cosines.
    """

    def __init__(self, classes: int, size: int, temperature: float = 0.05) -> None:
        super().__init__()
        self.temperature = temperature
        self.proxies = _linear_init(classes, size)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of one batch.

        Args:
            embeddings: (N, D), any floating dtype and any norm.
            labels: (N,) int64 class indices, 0 to C - 1.
        Returns:
            () loss in the embeddings' dtype, the mean over the rows.
        Raises:
            ValueError: N differs, or D is not that of the proxies.
        """
        cosines = cosines_to(self.proxies, embeddings, labels)  # (N, C)
        labels = labels.to(cosines.device, non_blocking=True)
        return F.cross_entropy(cosines / self.temperature, labels).to(embeddings.dtype)


class ArcFace(nn.Module):
    """Cross-entropy of scaled cosines, with a margin added to the angle to the own class.

    Deng et al., CVPR 2019; arXiv 1801.07698, equation 3, which sets the scale to 64 and the margin to 0.5 radians (28.6
    degrees, as in PyTorch Metric Learning):

        -log of the softmax of scale * (cos(theta_y + margin) for the own class y, cos theta_j for the others).

    Beyond theta_y = pi - margin, cos(theta_y + margin) would rise again. As in the authors' code,
    cos theta_y - margin sin margin replaces it there, which keeps falling.

    Args:
        classes: C.
        size: D of the embeddings.
        scale: multiplies the cosines.
        margin: in radians, 0 to pi.
    """

    def __init__(self, classes: int, size: int, scale: float = 64.0, margin: float = 0.5) -> None:
        super().__init__()
        self.scale, self.margin = scale, margin
        self.proxies = _linear_init(classes, size)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of one batch.

        Args:
            embeddings: (N, D), any floating dtype and any norm.
            labels: (N,) int64 class indices, 0 to C - 1.
        Returns:
            () loss in the embeddings' dtype, the mean over the rows.
        Raises:
            ValueError: N differs, or D is not that of the proxies.
        """
        cosines = cosines_to(self.proxies, embeddings, labels)  # (N, C)
        labels = labels.to(cosines.device, non_blocking=True)
        cosine = cosines.gather(1, labels[:, None])
        # the clamp avoids the infinite gradient of the root at 0, within 1e-6 rad of the proxy or its opposite
        sine = (1 - cosine.square()).clamp(min=1e-12).sqrt()
        wider = cosine * math.cos(self.margin) - sine * math.sin(self.margin)  # cos(theta + margin)
        beyond = cosine - self.margin * math.sin(self.margin)
        target = torch.where(cosine >= -math.cos(self.margin), wider, beyond)
        return F.cross_entropy(self.scale * cosines.scatter(1, labels[:, None], target), labels).to(embeddings.dtype)
