"""Augmentation of a batch before teacher and student see it, uint8 to uint8.

Random numbers are drawn on the CPU, so they are equal for all devices.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rkd_cli.runtime.distributed import ALONE, Ranks

_LUMA = (0.2989, 0.587, 0.114)  # weights of red, green and blue in gray


@dataclass(frozen=True)
class Augmentation:
    """``jitter``, then ``mixup``, unless 0, drawn from torch's global generator, which every step seeds.

    Each rank draws for the whole batch and changes its own images.
    """

    jitter: float
    mixup: float
    ranks: Ranks = ALONE

    def __call__(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) uint8 -> (N, 3, H, W) uint8."""
        if not (self.jitter or self.mixup):
            return images
        total = int(self.ranks.sum(torch.tensor(len(images))))
        mine = self.ranks.own_rows(total)
        if self.jitter:
            images = jitter(images, self.jitter, torch.default_generator, total, mine)
        if self.mixup:  # blends images of different ranks, so gather all pixels
            in_memory = images.permute(0, 2, 3, 1)  # contiguous, because images are channels-last
            whole = self.ranks.gather(in_memory).permute(0, 3, 1, 2)
            images = mixup(whole, self.mixup, torch.default_generator)[mine]
        return images


def jitter(
    images: Tensor, strength: float, generator: torch.Generator, total: int | None = None, rows: slice = slice(None)
) -> Tensor:
    """Change brightness, contrast and saturation of (N, 3, H, W) uint8, as torchvision's ColorJitter(s, s, s).

    Each image has its own three factors, drawn from [max(0, 1 - s), 1 + s]; their order is one for the batch. Factors
    are drawn for ``total`` images, of which ``images`` are ``rows``. The generator is on the CPU.
    """
    low = max(0.0, 1.0 - strength)
    factors = low + (1.0 + strength - low) * torch.rand(3, total or len(images), 1, 1, 1, generator=generator)[:, rows]
    order = torch.randperm(3, generator=generator).tolist()
    on_device = factors.to(images.device, non_blocking=True)
    pixels = images.float()
    for change in order:
        pixels = (_brighten, _contrast, _saturate)[change](pixels, on_device[change]).clamp_(0, 255)
    return _rounded(pixels)


def mixup(images: Tensor, alpha: float, generator: torch.Generator) -> Tensor:
    """Blend each image with another of the batch: l x + (1 - l) x', l drawn per image from Beta(alpha, alpha).

    Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018; for distillation, where teacher and student
    both see the blend, Beyer et al., "Knowledge distillation: A good teacher is patient and consistent", CVPR 2022.
    ``images`` are (N, 3, H, W) uint8; the generator is on the CPU.
    """
    others = torch.randperm(len(images), generator=generator)
    seed = int(torch.randint(2**63 - 1, (), generator=generator))
    drawn = np.random.default_rng(seed).beta(alpha, alpha, len(images))  # torch's Beta takes no generator
    weights = torch.from_numpy(drawn).float().to(images.device, non_blocking=True)
    pixels = images.float()
    return _rounded(pixels[others.to(images.device, non_blocking=True)].lerp_(pixels, weights[:, None, None, None]))


def _brighten(pixels: Tensor, factor: Tensor) -> Tensor:
    return pixels * factor


def _contrast(pixels: Tensor, factor: Tensor) -> Tensor:
    return _gray(pixels).mean(dim=(2, 3), keepdim=True).lerp(pixels, factor)


def _saturate(pixels: Tensor, factor: Tensor) -> Tensor:
    return _gray(pixels).lerp(pixels, factor)


def _gray(pixels: Tensor) -> Tensor:
    """(N, 3, H, W) -> (N, 1, H, W)."""
    red, green, blue = pixels.unbind(1)
    return (red * _LUMA[0] + green * _LUMA[1] + blue * _LUMA[2])[:, None]


def _rounded(pixels: Tensor) -> Tensor:
    return pixels.add_(0.5).byte()
