"""Batch samplers: balanced over classes as in the published protocol, or uniform for images without labels."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence

from torch.utils.data import Sampler

from rkd_cli.errors import DataError


def largest_batch(labels: Sequence[int], images_per_class: int) -> int:
    """The size of a balanced batch of all classes."""
    return sum(min(images_per_class, count) for count in Counter(labels).values())


class BalancedBatchSampler(Sampler[list[int]]):
    """Batches of a few images from each of some random classes (Park et al., CVPR 2019, section 4.1).

    Classes are drawn without replacement, each with ``images_per_class`` of its images drawn without replacement (all
    of them if it has fewer), until the batch is full; the last class is cut to fit. The batches are a function of
    ``seed`` and the epoch only.

    Args:
        labels: class of each image.
        batch: images per batch; every batch is full.
        images_per_class: images drawn from each class.
        batches: batches per epoch.
        seed: of all draws.
    Raises:
        DataError: there are no labels, or all classes together do not fill a batch.
    """

    def __init__(
        self, labels: Sequence[int] | None, batch: int, images_per_class: int, batches: int, seed: int
    ) -> None:
        if labels is None:
            raise DataError("balanced batches need labels, and these images have none. Sort them into class folders.")
        self.batch, self.images_per_class, self.batches, self.seed = batch, images_per_class, batches, seed
        self.epoch = 1
        self._images_of: dict[int, list[int]] = {}
        for index, label in enumerate(labels):
            self._images_of.setdefault(label, []).append(index)
        most = largest_batch(labels, images_per_class)
        if most < batch:
            raise DataError(
                f"a batch of {batch} with {images_per_class} images per class needs {-(-batch // images_per_class)} "
                f"classes; the {len(self._images_of)} of the training split give {most} images. Use --batch {most} "
                f"or less, or a larger --num-image-per-class."
            )

    def batches_of(self, epoch: int) -> Iterator[list[int]]:
        """The batches of an epoch, as positions in ``labels``."""
        rng = random.Random(f"batches {self.seed} {epoch}")
        classes = list(self._images_of)
        for _ in range(self.batches):
            batch: list[int] = []
            for label in rng.sample(classes, len(classes)):
                images = self._images_of[label]
                batch += rng.sample(images, min(self.images_per_class, len(images)))
                if len(batch) >= self.batch:
                    break
            yield batch[: self.batch]

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration by a DataLoader; ``batches_of`` does not need it."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        return self.batches_of(self.epoch)


class UniformBatchSampler:
    """Batches of images without labels: a random order of all images, then another, with no image twice in a batch.

    Each epoch starts with a new order. The batches are a function of ``seed`` and the epoch only.

    Args:
        images: number of images.
        batch: images per batch; every batch is full.
        batches: batches per epoch.
        seed: of all draws.
    Raises:
        DataError: the images do not fill a batch.
    """

    def __init__(self, images: int, batch: int, batches: int, seed: int) -> None:
        if images < batch:
            raise DataError(
                f"--batch {batch}: the training split has only {images} images. Use --batch {images} or less."
            )
        self.images, self.batch, self.batches, self.seed = images, batch, batches, seed

    def batches_of(self, epoch: int) -> Iterator[list[int]]:
        """The batches of an epoch, as positions in the set."""
        rng = random.Random(f"photos {self.seed} {epoch}")
        order: list[int] = []
        start = 0
        for _ in range(self.batches):
            batch = order[start : start + self.batch]
            start += self.batch
            if len(batch) < self.batch:
                start = self.batch - len(batch)
                # images already in this batch come last in the new order
                order = sorted(rng.sample(range(self.images), self.images), key=set(batch).__contains__)
                batch += order[:start]
            yield batch

    def __len__(self) -> int:
        return self.batches


BatchSampler = BalancedBatchSampler | UniformBatchSampler
