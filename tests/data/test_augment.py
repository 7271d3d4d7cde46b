"""Colors and blends of a batch: against torchvision's functions and loops written out."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms import functional

from rkd_cli.data.augment import Augmentation, jitter, mixup


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def images() -> Tensor:
    """Sixteen, in memory as the readers give them; the first are black, white and gray."""
    pixels = torch.randint(0, 256, (16, 9, 11, 3), dtype=torch.uint8)
    pixels[0], pixels[1], pixels[2] = 0, 255, 77
    return pixels.permute(0, 3, 1, 2)


def changed(image: Tensor, factors: list[float], order: tuple[int, ...]) -> Tensor:
    """One image by torchvision, in float."""
    found = image.float() / 255
    for change in order:
        adjust = (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation)[change]
        found = adjust(found, factors[change])
    return found * 255


@pytest.mark.parametrize("strength", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_jitter_is_torchvisions(images: Tensor, strength: float, seed: int) -> None:
    found = jitter(images, strength, seeded(seed))
    factors = 1 - strength + 2 * strength * torch.rand(3, 16, generator=seeded(seed))
    fits = [
        all(
            (changed(image, factors[:, slot].tolist(), order) - found[slot]).abs().max() < 0.501
            for slot, image in enumerate(images)
        )
        for order in permutations(range(3))
    ]
    assert any(fits)
    assert (found.dtype, found.shape) == (torch.uint8, images.shape)
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_jitter_has_factors_of_every_image_and_orders_of_every_batch() -> None:
    """Of gray images the three factors change nothing but brightness, so these can be read off."""
    gray = torch.full((3000, 3, 2, 2), 100, dtype=torch.uint8)
    brightness = jitter(gray, 0.5, seeded()).float().mean(dim=(1, 2, 3)) / 100
    assert len(set(brightness.tolist())) > 90
    assert [brightness.min(), brightness.max()] == pytest.approx([0.5, 1.5], abs=0.01)
    assert brightness.mean() == pytest.approx(1, abs=0.02)
    orders = {tuple(torch.randperm(3, generator=seeded(seed)).tolist()) for seed in range(60)}
    assert len(orders) == 6


@pytest.mark.parametrize("alpha", [0.3, 1.0, 4.0])
def test_mixup_blends_each_image_with_another(images: Tensor, alpha: float) -> None:
    found = mixup(images, alpha, seeded())
    generator = seeded()
    others = torch.randperm(16, generator=generator).tolist()
    drawn = np.random.default_rng(int(torch.randint(2**63 - 1, (), generator=generator)))
    for slot, share in enumerate(drawn.beta(alpha, alpha, 16)):
        blend = share * images[slot].double() + (1 - share) * images[others[slot]].double()
        assert (found[slot] - blend).abs().max() < 0.501
    assert sorted(others) == list(range(16))
    assert (found.dtype, found.shape) == (torch.uint8, images.shape)
    assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("alpha", "variance"), [(1e-30, 1 / 4), (0.5, 1 / 8), (1.0, 1 / 12), (8.0, 1 / 68), (1e6, 0)])
def test_shares_are_betas(alpha: float, variance: float) -> None:
    """Blends of black and white: the pixel is the share of white. Beta's variance is 1 / (8 alpha + 4)."""
    images = torch.zeros(8000, 3, 1, 1, dtype=torch.uint8)
    images[::2] = 255
    found = mixup(images, alpha, seeded())[:, 0, 0, 0].double() / 255
    others = torch.randperm(8000, generator=seeded())
    mixed = found[images[:, 0, 0, 0] != images[others, 0, 0, 0]]
    assert mixed.mean() == pytest.approx(0.5, abs=0.02)
    assert mixed.var() == pytest.approx(variance, abs=0.005)


@pytest.mark.parametrize("change", [jitter, mixup])
@pytest.mark.parametrize("count", [1, 2])
def test_draws_are_the_generators_alone(change: Callable[[Tensor, float, torch.Generator], Tensor], count: int) -> None:
    images = torch.randint(0, 256, (count, 3, 40, 40), dtype=torch.uint8)
    before, kept = images.clone(), torch.get_rng_state()
    one, other, third = (change(images, 0.5, seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, other)
    assert torch.equal(one, third) == (change is mixup and count == 1)
    assert torch.equal(images, before)
    assert torch.equal(torch.get_rng_state(), kept)


@pytest.mark.parametrize(("strength", "alpha"), [(0.0, 0.0), (0.4, 0.0), (0.0, 1.0), (0.4, 1.0)])
def test_augmentation_draws_from_the_seed_of_the_step(images: Tensor, strength: float, alpha: float) -> None:
    torch.manual_seed(5)
    found = Augmentation(strength, alpha)(images)
    expected, generator = images, seeded(5)
    if strength:
        expected = jitter(expected, strength, generator)
    if alpha:
        expected = mixup(expected, alpha, generator)
    assert torch.equal(found, expected)
    assert (found is images) == (strength == alpha == 0)


@pytest.mark.cuda
def test_a_gpu_gives_the_same_but_for_rounding(images: Tensor) -> None:
    for change, amount in ((jitter, 0.5), (mixup, 1.0)):
        here, there = change(images, amount, seeded()), change(images.cuda(), amount, seeded()).cpu()
        assert (here.int() - there.int()).abs().max() <= 1
