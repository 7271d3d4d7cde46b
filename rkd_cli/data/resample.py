"""Crops of any size brought to one side: bilinear with antialiasing, on uint8, the same bits on the CPU and elsewhere.

An output pixel is a mean of input pixels under a triangle that is one output pixel wide to each side, or one input
pixel where those are larger. Rows first, rounded to uint8, then columns, with weights in integers of at most 15 bits:
so does torch on the CPU, and so does torchvision's RandomResizedCrop of a uint8 tensor there. Elsewhere torch takes no
uint8, so the same integers are added up here, on any device.
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
    # channels last is four times as fast at 64 pixels than a view that torch has to make so itself
    image = window.contiguous().permute(2, 0, 1)[None]
    return F.interpolate(image, (side, side), mode="bilinear", antialias=True)[0].permute(1, 2, 0)


def resize_windows(pixels: Tensor, windows: Sequence[tuple[int, int, int, int, int]], side: int) -> Tensor:
    """``resize_window`` of one window of each of some images, all at once, on the device where they are.

    Args:
        pixels: (N, R, R, 3) uint8.
        windows: image, top, left, height and width of each.
        side: S.
    Returns:
        (B, S, S, 3) uint8.
    """
    device = pixels.device
    image, top, left, height, width = torch.tensor(windows).T.to(device, non_blocking=True)
    tallest, widest = (max(window[axis] for window in windows) for axis in (3, 4))
    x, across, bits = _weights(width, side, _taps(widest, side))
    y, down, more_bits = _weights(height, side, _taps(tallest, side))
    rows = top[:, None] + torch.arange(tallest, device=device).minimum(height[:, None] - 1)  # (B, h)
    x = left[:, None, None] + x
    # a tap at a time, for all taps of a batch would be gigabytes
    taps = (pixels[image[:, None, None], rows[:, :, None], at[:, None, :]] for at in x.unbind(2))
    lines = _mean(taps, across[:, None], bits)  # (B, h, S, 3)
    batch = torch.arange(len(windows), device=device)[:, None]
    return _mean((lines[batch, at] for at in y.unbind(2)), down[:, :, None], more_bits)


def _taps(longest: int, side: int) -> int:
    return 2 * math.ceil(max(longest / side, 1.0)) + 1


def _weights(size: Tensor, side: int, taps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which pixels make an output pixel, and by what weights.

    Args:
        size: (B,) of the inputs, in pixels.
        side: S, of the output.
        taps: K, as many as any output pixel has.
    Returns:
        (B, S, K) positions, (B, S, K) int32 weights, and (B,) the bits that these are shifted by.
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
    # as many bits as leave the largest weight, rounded, below 2^15
    largest = weight.amax(dim=(1, 2))
    bits = torch.stack([(0.5 + largest * 2.0 ** (n + 1)).long() < 2**_BITS for n in range(22)]).cumprod(0).sum(0)
    whole = (0.5 + weight * (2.0 ** bits.double())[:, None, None]).int()
    return position.clamp(min=0).minimum(size[:, None, None] - 1), whole, bits.int()


def _mean(taps: Iterable[Tensor], weights: Tensor, bits: Tensor) -> Tensor:
    """The rounded mean of uint8 tensors (B, ..., 3); sums of integers have the same bits on every device."""
    bits = bits[:, None, None, None]
    total = (1 << bits) >> 1
    for tap, weight in zip(taps, weights.unbind(-1), strict=True):
        total = total + tap.int() * weight[..., None]
    return (total >> bits).clamp(0, 255).byte()
