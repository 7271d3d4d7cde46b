"""Normalization of a network's images."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Normalization:
    """Normalization from RGB in [0, 1]; the defaults are torchvision's for ImageNet."""

    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    bgr255: bool = False  # BGR in 0..255 instead of RGB in [0, 1]
    input_size: int | None = None  # the only side that the network takes; images are resized to it
