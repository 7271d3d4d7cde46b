"""Classification losses on the cosines to learned class weights, ``proxies``, without bias."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rkd_cli.geometry import check_rows, unit_rows


def _drawn_as_linear(classes: int, size: int) -> nn.Parameter:
    """(C, D) weights, drawn as torch draws those of a linear layer: uniform in +-1/sqrt(D)."""
    bound = 1 / math.sqrt(size)
    return nn.Parameter(torch.empty(classes, size).uniform_(-bound, bound))


def cosines_to(proxies: Tensor, embeddings: Tensor, labels: Tensor) -> Tensor:
    """(N, C) cosines in float64 of (N, D) embeddings to (C, D) proxies; the (N,) labels are only checked."""
    check_rows(embeddings, labels=labels)
    if embeddings.shape[1] != proxies.shape[1]:
        raise ValueError(
            f"need embeddings and proxies of one D, got {tuple(embeddings.shape)} and {tuple(proxies.shape)}"
        )
    return unit_rows(embeddings) @ unit_rows(proxies).T


class NormalizedSoftmax(nn.Module):
    """Cross-entropy of the cosines to the class weights, divided by a temperature.

    Zhai, Wu; BMVC 2019 (Classification is a strong baseline for deep metric learning); arXiv 1811.12649. The paper
    sets the temperature to 0.05.

    Args:
        classes: C.
        size: D of the embeddings.
        temperature: what the cosines are divided by.
    """

    def __init__(self, classes: int, size: int, temperature: float = 0.05) -> None:
        super().__init__()
        self.temperature = temperature
        self.proxies = _drawn_as_linear(classes, size)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of one batch.

        Args:
            embeddings: (N, D), any floating type and any length.
            labels: (N,) int64 positions of classes, 0 to C - 1.
        Returns:
            () loss in the embeddings' type, the mean over the rows.
        Raises:
            ValueError: not (N, D) embeddings and the (N,) labels of the same N images, or another D.
        """
        cosines = cosines_to(self.proxies, embeddings, labels)  # (N, C)
        return F.cross_entropy(cosines / self.temperature, labels).to(embeddings.dtype)


class ArcFace(nn.Module):
    """Cross-entropy of scaled cosines, the angle to the own class enlarged by a margin.

    Deng et al., CVPR 2019; arXiv 1801.07698, equation 3, which sets the scale to 64 and the margin to 0.5 radians (28.6
    degrees, as PyTorch Metric Learning has it):

        -log of the softmax of scale * (cos(theta_y + margin) for the own class y, cos theta_j for the others).

    Beyond theta_y = pi - margin, where cos(theta_y + margin) would rise again, its place takes
    cos theta_y - margin sin margin, as in the authors' code: lower still, and falling.

    Args:
        classes: C.
        size: D of the embeddings.
        scale: what the cosines are multiplied by.
        margin: in radians, 0 to pi.
    """

    def __init__(self, classes: int, size: int, scale: float = 64.0, margin: float = 0.5) -> None:
        super().__init__()
        self.scale, self.margin = scale, margin
        self.proxies = _drawn_as_linear(classes, size)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of one batch.

        Args:
            embeddings: (N, D), any floating type and any length.
            labels: (N,) int64 positions of classes, 0 to C - 1.
        Returns:
            () loss in the embeddings' type, the mean over the rows.
        Raises:
            ValueError: not (N, D) embeddings and the (N,) labels of the same N images, or another D.
        """
        cosines = cosines_to(self.proxies, embeddings, labels)  # (N, C)
        cosine = cosines.gather(1, labels[:, None])
        # the root has no slope at 0: a row within 1e-6 rad of its proxy, or of the opposite, has no sine to change
        sine = (1 - cosine.square()).clamp(min=1e-12).sqrt()
        wider = cosine * math.cos(self.margin) - sine * math.sin(self.margin)  # cos(theta + margin)
        beyond = cosine - self.margin * math.sin(self.margin)
        target = torch.where(cosine >= -math.cos(self.margin), wider, beyond)
        return F.cross_entropy(self.scale * cosines.scatter(1, labels[:, None], target), labels).to(embeddings.dtype)
