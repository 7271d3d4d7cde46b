"""Resize uint8 crops with antialiased bilinear interpolation, to the same bits on all devices.

torch on the CPU (and so torchvision's RandomResizedCrop of uint8 tensors) resizes rows, rounds to uint8, then resizes
columns, with triangular filters whose weights are integers of at most 15 bits. On other devices torch does not support
uint8, so this module computes the same integer sums.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_BITS = 15  # of the largest weight


def resize_window(window: Tensor, side: int) -> Tensor:
    """(h, w, 3) uint8 on the CPU -> (side, side, 3) uint8."""
    # contiguous channels-last input is four times as fast at 64 pixels as letting torch convert it
    image = window.contiguous().permute(2, 0, 1)[None]
    return F.interpolate(image, (side, side), mode="bilinear", antialias=True)[0].permute(1, 2, 0)


def resize_windows(pixels: Tensor, windows: Sequence[tuple[int, int, int, int, int]], side: int) -> Tensor:
    """(B, S, S, 3) uint8: ``resize_window`` for B windows (image, top, left, height, width) of (N, R, R, 3) uint8."""
    device = pixels.device
    image, top, left, height, width = torch.tensor(windows).T.to(device, non_blocking=True)
    tallest, widest = (max(window[axis] for window in windows) for axis in (3, 4))
    x, across, bits = _weights(width, side, _taps(widest, side))
    y, down, more_bits = _weights(height, side, _taps(tallest, side))
    rows = top[:, None] + torch.arange(tallest, device=device).minimum(height[:, None] - 1)  # (B, h)
    x = left[:, None, None] + x
    # one tap at a time: all taps of a batch would be gigabytes
    taps = (pixels[image[:, None, None], rows[:, :, None], at[:, None, :]] for at in x.unbind(2))
    lines = _mean(taps, across[:, None], bits)  # (B, h, S, 3)
    batch = torch.arange(len(windows), device=device)[:, None]
    return _mean((lines[batch, at] for at in y.unbind(2)), down[:, :, None], more_bits)


def _taps(longest: int, side: int) -> int:
    return 2 * math.ceil(max(longest / side, 1.0)) + 1


def _weights(size: Tensor, side: int, taps: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, S, K) input positions and (B, S, K) int32 weights of each output pixel, and (B,) bits to shift the sum by.

    ``size`` are the (B,) input sides, ``taps`` is K.
    """
    scale = size.double()[:, None] / side
    reach = scale.clamp(min=1.0)  # of the triangle
    center = scale * (torch.arange(side, device=size.device) + 0.5)  # (B, S)
    first = (center - reach + 0.5).long()
    position = first[:, :, None] + torch.arange(taps, device=size.device)
    away = (position + 0.5 - center[:, :, None]).abs() / reach[:, :, None]
    inside = (position >= 0) & (position < size[:, None, None])
    weight = (1 - away).clamp(min=0) * inside
    weight = weight / weight.sum(2, keepdim=True)
    # the largest number of bits with which the largest weight, rounded, is below 2^15
    largest = weight.amax(dim=(1, 2))
    bits = torch.stack([(0.5 + largest * 2.0 ** (n + 1)).long() < 2**_BITS for n in range(22)]).cumprod(0).sum(0)
    whole = (0.5 + weight * (2.0 ** bits.double())[:, None, None]).int()
    return position.clamp(min=0).minimum(size[:, None, None] - 1), whole, bits.int()


def _mean(taps: Iterable[Tensor], weights: Tensor, bits: Tensor) -> Tensor:
    """The rounded weighted mean of uint8 tensors (B, ..., 3), as integer sums, which are equal on all devices."""
    bits = bits[:, None, None, None]
    total = (1 << bits) >> 1
    for tap, weight in zip(taps, weights.unbind(-1), strict=True):
        total = total + tap.int() * weight[..., None]
    return (total >> bits).clamp(0, 255).byte()
