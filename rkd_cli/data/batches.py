"""Streams of uint8 batches, decoded by worker processes while the network works on the batch before."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from rkd_cli.data.images import Crop, ImageSet, centre_crop, load_crops, random_crops
from rkd_cli.data.sampler import BalancedBatchSampler
from rkd_cli.errors import DataError
from rkd_cli.runtime import derive_seed

Batch = tuple[Tensor, Tensor]  # (B, 3, H, W) uint8 images, (B,) int64 labels


class TrainBatches:
    """Random crops and flips of balanced batches. What an epoch holds depends on its number and the seed alone."""

    def __init__(
        self,
        images: ImageSet,
        sampler: BalancedBatchSampler,
        resize: int,
        image_size: int,
        workers: int,
        pin: bool,
    ) -> None:
        self._sampler = sampler
        plan = _RandomCropPlan(sampler, resize, image_size)
        self._loader = _loader(images, plan, resize, image_size, workers, pin, persistent=workers > 0)

    def __len__(self) -> int:
        return len(self._sampler)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """The batches of an epoch, counted from 1.

        Raises:
            DataError: a batch holds damaged images.
        """
        self._sampler.set_epoch(epoch)
        yield from _checked(self._loader)


class EvalBatches:
    """Centre crops of every image, in order."""

    def __init__(
        self, images: ImageSet, batch: int, resize: int, image_size: int, workers: int, pin: bool = False
    ) -> None:
        self.images = images
        crops = [centre_crop(i, resize, image_size) for i in range(len(images))]
        plan = [crops[start : start + batch] for start in range(0, len(crops), batch)]
        self._loader = _loader(images, plan, resize, image_size, workers, pin, persistent=False)

    def __iter__(self) -> Iterator[Batch]:
        """
        Raises:
            DataError: a batch holds damaged images.
        """
        yield from _checked(self._loader)


class _RandomCropPlan:
    def __init__(self, sampler: BalancedBatchSampler, resize: int, image_size: int) -> None:
        self._sampler, self._resize, self._image_size = sampler, resize, image_size

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> Iterator[list[Crop]]:
        seed = derive_seed(self._sampler.seed, "crops", self._sampler.epoch)
        generator = torch.Generator().manual_seed(seed)
        for indices in self._sampler:
            yield random_crops(indices, self._resize, self._image_size, generator)


class _Decoder(Dataset[Batch]):
    def __init__(self, paths: Sequence[Path], labels: Sequence[int], resize: int, image_size: int) -> None:
        self._paths, self._resize, self._image_size = paths, resize, image_size
        self._labels = torch.tensor(labels)

    def __getitems__(self, crops: list[Crop]) -> Batch | DataError:
        # an error crosses the process border as a value: raised, it would arrive wrapped in a worker's traceback
        try:
            images = load_crops(self._paths, crops, self._resize, self._image_size)
        except DataError as error:
            return error
        return images, self._labels[[crop.index for crop in crops]]


def _as_is(batch: Any) -> Any:
    return batch  # __getitems__ has made a batch of it already


def _leave_signals_to_the_parent(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _loader(
    images: ImageSet,
    plan: Iterable[list[Crop]],
    resize: int,
    image_size: int,
    workers: int,
    pin: bool,
    persistent: bool,
) -> DataLoader[Batch]:
    return DataLoader(
        _Decoder(images.paths, images.labels, resize, image_size),
        batch_sampler=plan,
        num_workers=workers,
        collate_fn=_as_is,
        pin_memory=pin,
        persistent_workers=persistent,
        worker_init_fn=_leave_signals_to_the_parent,
    )


def _checked(loader: DataLoader[Batch]) -> Iterator[Batch]:
    for batch in loader:
        if isinstance(batch, DataError):
            raise batch
        yield batch
