"""Batches of pixels, decoded by workers, or read from cached pixels in a file or on the device.

All three readers return the same bits: (B, 3, H, W) uint8 in channels-last memory format.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from rkd_cli.data.cache import PixelCache, cache_bytes, make_cache, read_cache, room_for
from rkd_cli.data.decode import AS_DISPLAYED, Crop, Decoding, center_crop, crop_table, cut, load_crops, load_resized
from rkd_cli.data.members import joined
from rkd_cli.data.resample import resize_windows
from rkd_cli.data.sampler import BatchSampler
from rkd_cli.data.splits import ImageSet
from rkd_cli.data.workers import in_workers
from rkd_cli.errors import DataError
from rkd_cli.events import Note, Progress, Reporter
from rkd_cli.runtime.context import fits_on, worker_count
from rkd_cli.runtime.distributed import ALONE, Ranks
from rkd_cli.runtime.files import default_cache_folder
from rkd_cli.runtime.seeds import derive_seed


class Batch(NamedTuple):
    """Pixels, labels and positions of some images of a set. All but the pixels are on the CPU."""

    images: Tensor  # (B, 3, H, W) uint8
    labels: Tensor  # (B,) int64, -1 without labels
    index: Tensor  # type: ignore[assignment]  # (B,) int64, positions in the set; hides tuple.index
    view: Tensor  # (B,) int64, number of the cached view of the image, 0 without cached views


class PixelReader(Protocol):
    """Reads batches of crops."""

    @property
    def what(self) -> str:
        """The source of the pixels, for display."""
        ...

    def read(self, images: ImageSet, plan: Iterable[list[Crop]], all_problems: bool = False) -> Iterator[Batch]:
        """A batch for each list of crops; their indices are positions in ``images``.

        A damaged image raises a DataError; with ``all_problems`` after the last batch, naming all of them.
        """
        ...


# (indices, resize, image_size, generator) -> one crop per image
DrawCrops = Callable[[Sequence[int], int, int, torch.Generator], list[Crop]]
MakeCache = Callable[[Path, Sequence[Path], int, int, Reporter, Decoding], PixelCache]  # ``make_cache``


class TrainLoader:
    """Training batches of random crops and flips, a function of the seed and the epoch only.

    ``draw`` must take all randomness from the generator that it is given. Each of ``ranks`` gets its rows of a batch.
    """

    def __init__(
        self,
        images: ImageSet,
        sampler: BatchSampler,
        resize: int,
        image_size: int,
        reader: PixelReader,
        draw: DrawCrops,
        ranks: Ranks = ALONE,
    ) -> None:
        self._images, self._sampler, self._sides, self._reader = images, sampler, (resize, image_size), reader
        self._draw, self._ranks = draw, ranks

    @property
    def what(self) -> str:
        """The source of the pixels, for display."""
        return self._reader.what

    @property
    def batch(self) -> int:
        """The number of images in a batch over all ranks."""
        return self._sampler.batch

    def __len__(self) -> int:
        return len(self._sampler)

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """This rank's rows of the batches of an epoch, which counts from 1, without the ``first`` batches."""
        return self._reader.read(self._images, self._plan(epoch, first))

    def _plan(self, epoch: int, first: int) -> Iterator[list[Crop]]:
        generator = torch.Generator().manual_seed(derive_seed(self._sampler.seed, "crops", epoch))
        for number, indices in enumerate(self._sampler.batches_of(epoch)):
            crops = self._draw(indices, *self._sides, generator)  # also for skipped batches, to advance the generator
            if number >= first:
                yield crops[self._ranks.own_rows(len(crops))]


class CachedViews:
    """K views (fixed crops) of each of N images, whose teacher embeddings are cached; ``draw`` picks one per image.

    ``sides`` are (resize, image_size). The views are a function of the arguments only.
    """

    def __init__(
        self, count: int, views: int, sides: tuple[int, int], seed: int, min_area: float | None = None
    ) -> None:
        self._views = views
        self._table = crop_table(count * views, *sides, derive_seed(seed, "views"), min_area)

    def __len__(self) -> int:
        """N * K."""
        return len(self._table)

    @property
    def digest(self) -> str:
        """Digest of all views."""
        return hashlib.sha256(self._table.data).hexdigest()

    def crops(self, rows: Sequence[int]) -> list[Crop]:
        """The views numbered ``rows``; the K views of an image are consecutive."""
        return [
            Crop(row // self._views, top, left, flip, (height, width) if height else None, row % self._views)
            for row, (top, left, height, width, flip) in zip(rows, self._table[rows].tolist(), strict=True)
        ]

    def draw(self, indices: Sequence[int], resize: int, image_size: int, generator: torch.Generator) -> list[Crop]:
        """See ``DrawCrops``."""
        picks = torch.randint(0, self._views, (len(indices),), generator=generator).tolist()
        return self.crops([index * self._views + pick for index, pick in zip(indices, picks, strict=True)])


class EvalLoader:
    """Center crops of all images from number ``first`` on, in order.

    Ranks take whole batches in turn: with the batches of a single process, embeddings are equal to the bit.
    """

    def __init__(
        self,
        images: ImageSet,
        batch: int,
        resize: int,
        image_size: int,
        reader: PixelReader,
        first: int = 0,
        ranks: Ranks = ALONE,
    ) -> None:
        self.images, self._reader = images, reader
        self._batch, self._sides, self._first, self._ranks = batch, (resize, image_size), first, ranks

    def whole(self) -> EvalLoader:
        """A loader of all batches, for one process."""
        loader = copy(self)
        loader._ranks = ALONE
        return loader

    @property
    def rounds(self) -> int:
        """The largest number of batches of a rank."""
        return -(-(len(self.images) - self._first) // (self._batch * self._ranks.size))

    def __iter__(self) -> Iterator[Batch]:
        """The batches. A DataError at the end names all damaged images."""
        return self._reader.read(self.images, self._plan(), all_problems=True)

    def pixels(self, indices: Sequence[int]) -> Tensor:
        """(B, 3, H, W) uint8 center crops of some images."""
        (batch,) = self._reader.read(self.images, [[center_crop(index, *self._sides) for index in indices]])
        return batch.images

    def _plan(self) -> Iterator[list[Crop]]:
        count = len(self.images)
        mine = self._ranks.rank * self._batch, self._batch * self._ranks.size
        for start in range(self._first + mine[0], count, mine[1]):
            yield [center_crop(index, *self._sides) for index in range(start, min(start + self._batch, count))]


@dataclass(frozen=True)
class StreamReader:
    """Decodes images in worker processes while the network works on the previous batch."""

    resize: int
    image_size: int
    workers: int
    pin: bool = False
    decoding: Decoding = AS_DISPLAYED

    @property
    def what(self) -> str:
        """The source of the pixels, for display."""
        return f"decoded in every epoch by {self.workers} workers"

    def read(self, images: ImageSet, plan: Iterable[list[Crop]], all_problems: bool = False) -> Iterator[Batch]:
        """See ``PixelReader``."""
        problems: list[str] = []
        decode = partial(_decode, images.paths, self.resize, self.image_size, self.decoding)
        for crops, pixels in in_workers(decode, plan, self.workers):
            if isinstance(pixels, DataError):
                problems += pixels.problems
                if not all_problems:
                    break
                continue
            batch = torch.from_numpy(pixels)
            yield _pixel_batch(images, crops, batch.pin_memory() if self.pin else batch)
        if problems:
            raise DataError(*problems)


@dataclass(frozen=True)
class FileReader:
    """Reads crops from the cache file, without synchronizing the GPU."""

    cache: PixelCache
    image_size: int
    pin: bool = False

    @property
    def what(self) -> str:
        """The source of the pixels, for display."""
        return f"from {self.cache.path}"

    def read(self, images: ImageSet, plan: Iterable[list[Crop]], all_problems: bool = False) -> Iterator[Batch]:
        """See ``PixelReader``; what is in the cache is not damaged."""
        rows = self.cache.rows_of(images.paths)
        for crops in plan:
            yield _pixel_batch(images, crops, self._cut(crops, rows))

    def _cut(self, crops: list[Crop], rows: list[int]) -> Tensor:
        side = self.image_size
        batch = torch.empty(len(crops), side, side, 3, dtype=torch.uint8, pin_memory=self.pin)
        for slot, crop in zip(batch, crops, strict=True):
            slot.copy_(cut(self.cache.pixels[rows[crop.index]], crop, side))
        return batch


class DeviceReader:
    """Stores all pixels on the device, where a batch is one indexing operation."""

    what = "on the device"

    def __init__(self, cache: PixelCache, image_size: int, device: torch.device) -> None:
        self._cache, self._image_size = cache, image_size
        self._pixels = cache.pixels.to(device)  # (N, R, R, 3)

    def read(self, images: ImageSet, plan: Iterable[list[Crop]], all_problems: bool = False) -> Iterator[Batch]:
        """See ``PixelReader``; what is in the cache is not damaged."""
        rows = self._cache.rows_of(images.paths)
        for crops in plan:
            yield _pixel_batch(images, crops, self._cut(crops, rows))

    def _cut(self, crops: list[Crop], rows: list[int]) -> Tensor:
        if any(crop.size for crop in crops):
            return self._cut_and_resize(crops, rows)
        device = self._pixels.device
        where = torch.tensor([(rows[crop.index], crop.top, crop.left, crop.flip) for crop in crops])
        row, top, left, flip = where.to(device, non_blocking=True).T[:, :, None]  # (B, 1) each
        along = torch.arange(self._image_size, device=device)
        y = top + along  # (B, S)
        x = left + torch.where(flip.bool(), self._image_size - 1 - along, along)
        return self._pixels[row[:, :, None], y[:, :, None], x[:, None, :]]  # (B, S, S, 3)

    def _cut_and_resize(self, crops: list[Crop], rows: list[int]) -> Tensor:
        side = self._image_size
        windows = [(rows[crop.index], crop.top, crop.left, *(crop.size or (side, side))) for crop in crops]
        batch = resize_windows(self._pixels, windows, side)
        flip = torch.tensor([crop.flip for crop in crops]).to(batch.device, non_blocking=True)
        return torch.where(flip[:, None, None, None], batch.flip(2), batch)


def pick_reader(
    mode: str,
    cache_dir: Path | None,
    sets: Sequence[ImageSet],
    resize: int,
    image_size: int,
    device: torch.device,
    workers: int | None,
    report: Reporter,
    make: MakeCache | None = make_cache,
) -> PixelReader:
    """The reader for ``--cache``, after creating its cache if needed.

    ``auto`` stores pixels on a GPU if they take less than a quarter of its free memory, else in a file if it takes less
    than half of the free disk, else nowhere. ``sets`` are all images that will be read, decoded with equal settings.
    ``make`` creates a missing cache; if it is None, ``auto`` creates none.
    """
    pin = device.type == "cuda"
    decoding = sets[0].decoding
    stream = StreamReader(resize, image_size, worker_count(workers, device), pin, decoding)
    if mode == "none":
        return stream
    folder = cache_dir or default_cache_folder()
    most = cache_bytes(sum(map(len, sets)), resize)
    if mode == "auto" and not (make and room_for(folder, most)) and not any(folder.glob(f"{resize}-*.pixels")):
        return stream  # without an object for each image of an archive
    paths = sorted({path for images in sets for path in images.paths})
    size = cache_bytes(len(paths), resize)
    cache = read_cache(folder, paths, resize, decoding)
    if cache is None:
        if mode == "auto" and not (make and room_for(folder, size)):
            return stream
        cache = (make or make_cache)(folder, paths, resize, worker_count(workers), report, decoding)
    if (mode == "device" and device.type == "cuda") or (mode == "auto" and fits_on(device, size)):
        return DeviceReader(cache, image_size, device)
    return FileReader(cache, image_size, pin)


def find_damaged(sets: Sequence[ImageSet], workers: int | None, report: Reporter) -> dict[Path, str]:
    """{path: error} of all images that cannot be decoded or are too large."""
    paths = joined(images.paths for images in sets)
    damaged: dict[Path, str] = {}
    found = in_workers(partial(_problem_of, sets[0].decoding), paths, worker_count(workers))
    for number, (path, problem) in enumerate(zip(paths, found, strict=True), 1):
        if problem:
            damaged[path] = problem
        if number % 50 == 0 or number == len(paths):
            report(Progress("Checking images", number, len(paths)))
    return damaged


def without_damaged(sets: Sequence[ImageSet], workers: int | None, report: Reporter) -> Sequence[ImageSet]:
    """The sets without the images that cannot be decoded, after a note about them."""
    damaged = find_damaged([part for images in sets for part in images.parts], workers, report)
    if not damaged:
        return sets
    report(Note(f"{len(damaged)} damaged images are left out, the first of them {next(iter(damaged))}"))
    return [images.without(damaged) for images in sets]


def _problem_of(decoding: Decoding, path: Path) -> str:
    try:
        load_resized(path, 8, decoding)  # decodes the whole file, whatever the size in pixels
    except DataError as error:
        return error.problems[0]
    return ""


def _decode(
    paths: Sequence[Path], resize: int, image_size: int, decoding: Decoding, crops: list[Crop]
) -> tuple[list[Crop], np.ndarray | DataError]:
    # return the error: DataLoader would wrap a raised one in the worker's traceback
    try:
        return crops, load_crops(paths, crops, resize, image_size, decoding).permute(0, 2, 3, 1).numpy()  # no copy
    except DataError as error:
        return crops, error


def _pixel_batch(images: ImageSet, crops: list[Crop], pixels: Tensor) -> Batch:
    return batch_of(images, crops, pixels.permute(0, 3, 1, 2))  # (B, H, W, 3) -> (B, 3, H, W), no copy


def batch_of(images: ImageSet, crops: list[Crop], tensor: Tensor) -> Batch:
    """A batch of ``tensor`` with the labels, positions and views of its crops."""
    labels = [-1 if images.labels is None else images.labels[crop.index] for crop in crops]
    facts = torch.tensor([labels, [crop.index for crop in crops], [crop.view for crop in crops]])  # (3, B)
    return Batch(tensor, *facts.unbind())
