"""What the batches of an epoch and of an evaluation hold, wherever their pixels come from."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from rkd_cli.data.images import Crop, ImageSet, centre_crop, random_crops
from rkd_cli.data.sampler import BalancedBatchSampler
from rkd_cli.data.supply import Batch, Supply
from rkd_cli.runtime.device import derive_seed


class TrainBatches:
    """Random crops and flips of balanced batches. What an epoch holds depends on its number and the seed alone."""

    def __init__(
        self, images: ImageSet, sampler: BalancedBatchSampler, resize: int, image_size: int, supply: Supply
    ) -> None:
        self._sampler = sampler
        self._plan = _RandomCropPlan(sampler, resize, image_size)
        self._batches = supply.batches(images, self._plan, again=True)

    def __len__(self) -> int:
        return len(self._sampler)

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, counted from 1, but for the ``first`` ones.

        Raises:
            DataError: a batch holds damaged images.
        """
        self._sampler.set_epoch(epoch)
        self._plan.first = first
        yield from self._batches


class EvalBatches:
    """Centre crops of every image, in order."""

    def __init__(self, images: ImageSet, batch: int, resize: int, image_size: int, supply: Supply) -> None:
        self.images = images
        crops = [centre_crop(i, resize, image_size) for i in range(len(images))]
        plan = [crops[start : start + batch] for start in range(0, len(crops), batch)]
        self._batches = supply.batches(images, plan, again=False)

    def __iter__(self) -> Iterator[Batch]:
        """
        Raises:
            DataError: a batch holds damaged images.
        """
        yield from self._batches


class _RandomCropPlan:
    def __init__(self, sampler: BalancedBatchSampler, resize: int, image_size: int) -> None:
        self._sampler, self._resize, self._image_size = sampler, resize, image_size
        self.first = 0  # batches that are drawn, as all are, but not given

    def __len__(self) -> int:
        return len(self._sampler) - self.first

    def __iter__(self) -> Iterator[list[Crop]]:
        seed = derive_seed(self._sampler.seed, "crops", self._sampler.epoch)
        generator = torch.Generator().manual_seed(seed)
        for number, indices in enumerate(self._sampler):
            crops = random_crops(indices, self._resize, self._image_size, generator)
            if number >= self.first:
                yield crops
