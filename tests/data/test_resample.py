"""Resized windows: the same bits one by one and all at once, and the mean that they are by definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rkd_cli.data.resample import resize_window, resize_windows


def by_definition(window: Tensor, side: int) -> Tensor:
    """(h, w, 3) -> (side, side, 3) in float64: triangles, written out pixel by pixel."""

    def along(size: int) -> Tensor:
        weights = torch.zeros(side, size, dtype=torch.float64)
        scale = size / side
        for out in range(side):
            for at in range(size):
                away = abs((at + 0.5) - (out + 0.5) * scale) / max(scale, 1.0)
                weights[out, at] = max(0.0, 1.0 - away)
        return weights / weights.sum(dim=1, keepdim=True)

    height, width, _ = window.shape
    return torch.einsum("yh,xw,hwc->yxc", along(height), along(width), window.double())


@pytest.fixture
def pixels() -> Tensor:
    """Noise, black and white, white, and a ramp."""
    images = torch.randint(0, 256, (4, 60, 60, 3), dtype=torch.uint8)
    images[1] = 255 * (images[1] > 127)
    images[2] = 255
    images[3] = torch.arange(60, dtype=torch.uint8)[:, None] * 4
    return images


def windows_of(pixels: Tensor, count: int) -> list[tuple[int, int, int, int, int]]:
    found = []
    for number in range(count):
        height, width = torch.randint(1, 61, (2,)).tolist()
        top, left = (int(torch.randint(0, 61 - side, ())) for side in (height, width))
        found.append((number % len(pixels), top, left, height, width))
    return [*found, (0, 0, 0, 60, 60), (1, 59, 59, 1, 1), (2, 0, 0, 60, 1)]


@pytest.mark.parametrize("side", [1, 7, 32, 60, 91])
def test_all_at_once_are_the_bits_of_one_by_one(pixels: Tensor, side: int) -> None:
    windows = windows_of(pixels, 60)
    found = resize_windows(pixels, windows, side)
    assert (found.dtype, found.shape) == (torch.uint8, (len(windows), side, side, 3))
    for made, (image, top, left, height, width) in zip(found, windows, strict=True):
        window = pixels[image, top : top + height, left : left + width]
        assert torch.equal(made, resize_window(window, side)), (height, width)


@pytest.mark.parametrize("side", [1, 7, 32, 60, 91])
def test_they_are_means_under_a_triangle(pixels: Tensor, side: int) -> None:
    """Rounded twice, after rows and after columns: by at most a half each time, and the weights by next to nothing."""
    for image, top, left, height, width in windows_of(pixels, 12):
        window = pixels[image, top : top + height, left : left + width]
        error = (resize_window(window, side).double() - by_definition(window, side)).abs().max()
        assert error < 1.1
    assert torch.equal(resize_window(pixels[2], side), torch.full((side, side, 3), 255, dtype=torch.uint8))


def test_what_has_the_side_already_is_left_as_it_is(pixels: Tensor) -> None:
    assert torch.equal(resize_windows(pixels, [(0, 5, 9, 32, 32)], 32)[0], pixels[0, 5:37, 9:41])
