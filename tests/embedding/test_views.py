"""Vectors that are computed once: of which crops they are, and of which files."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from rkd_cli.data import ImageSet
from rkd_cli.data.decode import load_crops
from rkd_cli.data.loader import CachedViews, StreamReader
from rkd_cli.embedding import views as module
from rkd_cli.embedding.views import ViewCache
from rkd_cli.events import silent
from rkd_cli.runtime.context import make_context

SIDES = (12, 10)


def mean_color(images: Tensor) -> Tensor:
    return images.float().mean(dim=(2, 3))


@pytest.fixture
def images(tmp_path: Path) -> ImageSet:
    """Seven of one size and time."""
    paths = tuple(tmp_path / f"photos/{name}.bmp" for name in range(7))
    paths[0].parent.mkdir()
    for path in paths:
        noise = torch.randint(0, 256, (14, 14, 3), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(path)
        os.utime(path, ns=(5, 5))
    return ImageSet(paths, None, ())


@pytest.fixture
def cache(tmp_path: Path) -> ViewCache:
    reader, context = StreamReader(*SIDES, 0), make_context("cpu", "fp32")
    return ViewCache(mean_color, 3, "a digest", *SIDES, reader, tmp_path / "cache", context, silent)


@pytest.mark.parametrize("min_area", [None, 0.3])
def test_the_vectors_are_those_of_each_crop(
    images: ImageSet, cache: ViewCache, monkeypatch: pytest.MonkeyPatch, min_area: float | None
) -> None:
    monkeypatch.setattr(module, "_AT_ONCE", 4)
    views = CachedViews(7, 3, SIDES, 5, min_area)
    found = cache.views(images, views, torch.float32, "Computing")
    crops = load_crops(images.paths, views.crops(range(21)), *SIDES)
    assert torch.equal(found, mean_color(crops).view(7, 3, 3))
    for path, vector in zip(images.paths, cache.center(images, "Computing"), strict=True):
        cut = Image.open(path).resize((12, 12), Image.Resampling.BILINEAR).crop((1, 1, 11, 11))
        torch.testing.assert_close(vector, torch.tensor(np.asarray(cut)).float().mean(dim=(0, 1)))


def test_files_that_were_swapped_are_computed_again(images: ImageSet, cache: ViewCache, tmp_path: Path) -> None:
    views = CachedViews(7, 2, SIDES, 5)

    def found() -> tuple[Tensor, Tensor]:
        return cache.views(images, views, torch.float32, "Computing"), cache.center(images, "Computing")

    before = found()
    images.paths[2].rename(tmp_path / "aside")
    images.paths[4].rename(images.paths[2])
    (tmp_path / "aside").rename(images.paths[4])
    after = found()
    order = [0, 1, 4, 3, 2, 5, 6]
    assert torch.equal(after[1], before[1][order])
    assert not torch.equal(after[0][2], before[0][2])
