"""Where batches of pixels come from: decoded anew by workers, a file of decoded images, or the device itself.

All three deliver the same bits: (B, 3, H, W) uint8, in memory one pixel's three channels after another, as convolutions
like it best.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from rkd_cli.data.cache import PixelCache, cache_bytes, make_cache, read_cache, room_for
from rkd_cli.data.images import Crop, ImageSet, load_crops
from rkd_cli.errors import DataError
from rkd_cli.events import Progress, Reporter
from rkd_cli.runtime.device import worker_count

Batch = tuple[Tensor, Tensor]  # (B, 3, H, W) uint8 images, (B,) int64 labels


class Supply(Protocol):
    """Makes batches of the crops of a plan, each time they are iterated."""

    @property
    def what(self) -> str:
        """For the run's header."""
        ...

    def batches(self, images: ImageSet, plan: Iterable[list[Crop]], again: bool) -> Iterable[Batch]:
        """
        Args:
            images: what the crops' indices count.
            plan: the crops of each batch; it is iterated anew for each pass.
            again: whether there will be many passes, so that it pays to keep workers.
        Raises:
            DataError: (while iterating) a batch holds damaged images.
        """
        ...


@dataclass(frozen=True)
class Streamed:
    """Decoded by worker processes while the network works on the batch before."""

    resize: int
    image_size: int
    workers: int
    pin: bool = False

    @property
    def what(self) -> str:
        return f"decoded anew by {self.workers} workers"

    def batches(self, images: ImageSet, plan: Iterable[list[Crop]], again: bool) -> Iterable[Batch]:
        # what is looked at once, before training, names all that is damaged; later a first damaged image is an end
        return _Checked(self._loader(images.paths, images.labels, plan, again and self.workers > 0), patient=not again)

    def decode(self, paths: Sequence[Path], plan: Iterable[list[Crop]]) -> Iterator[Tensor | DataError]:
        """Images alone, or the problems of those that cannot be read."""
        for batch in self._loader(paths, [0] * len(paths), plan, persistent=False):
            yield batch if isinstance(batch, DataError) else batch[0]

    def _loader(
        self, paths: Sequence[Path], labels: Sequence[int], plan: Iterable[list[Crop]], persistent: bool
    ) -> DataLoader[Batch]:
        return DataLoader(
            _Decoder(paths, labels, self.resize, self.image_size),
            batch_sampler=plan,
            num_workers=self.workers,
            collate_fn=_as_is,
            pin_memory=self.pin,
            persistent_workers=persistent,
            worker_init_fn=_leave_signals_to_the_parent,
        )


@dataclass(frozen=True)
class Mapped:
    """Copied from the cache file. A GPU still works on the batch before, for nothing here waits for it."""

    cache: PixelCache
    image_size: int
    pin: bool = False

    @property
    def what(self) -> str:
        return f"from {self.cache.path}"

    def batches(self, images: ImageSet, plan: Iterable[list[Crop]], again: bool) -> Iterable[Batch]:
        return _Batches(images, plan, self.cache, self._cut, torch.device("cpu"))

    def _cut(self, crops: list[Crop], rows: list[int]) -> Tensor:
        side = self.image_size
        batch = torch.empty(len(crops), side, side, 3, dtype=torch.uint8, pin_memory=self.pin)
        for slot, crop, row in zip(batch, crops, rows, strict=True):
            window = self.cache.pixels[row, crop.top : crop.top + side, crop.left : crop.left + side]
            slot.copy_(window.flip(1) if crop.flip else window)  # numpy takes seven times as long to mirror
        return batch.permute(0, 3, 1, 2)  # (B, H, W, 3) -> (B, 3, H, W), no copy


class Resident:
    """All pixels stay on the device; a batch is one indexing there."""

    what = "on the device"

    def __init__(self, cache: PixelCache, image_size: int, device: torch.device) -> None:
        self._cache, self._image_size = cache, image_size
        self._pixels = cache.pixels.to(device)  # (N, R, R, 3)

    def batches(self, images: ImageSet, plan: Iterable[list[Crop]], again: bool) -> Iterable[Batch]:
        return _Batches(images, plan, self._cache, self._cut, self._pixels.device)

    def _cut(self, crops: list[Crop], rows: list[int]) -> Tensor:
        device = self._pixels.device
        where = torch.tensor([(row, crop.top, crop.left, crop.flip) for crop, row in zip(crops, rows, strict=True)])
        row, top, left, flip = where.to(device, non_blocking=True).T[:, :, None]  # (B, 1) each; a small copy
        along = torch.arange(self._image_size, device=device)
        y = top + along  # (B, S)
        x = left + torch.where(flip.bool(), self._image_size - 1 - along, along)
        batch = self._pixels[row[:, :, None], y[:, :, None], x[:, None, :]]
        return batch.permute(0, 3, 1, 2)  # (B, S, S, 3) -> (B, 3, S, S), no copy


def pick_supply(
    mode: str,
    folder: Path,
    sets: Sequence[ImageSet],
    resize: int,
    image_size: int,
    device: torch.device,
    workers: int | None,
    report: Reporter,
    make: bool = True,
) -> Supply:
    """The supply that ``--cache`` asks for, its cache made if need be.

    ``auto`` keeps the pixels on a GPU where they take less than a quarter of its free memory, else in a file where that
    takes less than half of the free disk, and decodes anew where it does not or ``folder`` cannot be written.

    Args:
        mode: auto, none, disk or device.
        folder: where the cache file goes.
        sets: all images that batches will be made of.
        workers: processes that decode, None for as many as suit.
        make: whether ``auto`` may make a cache that is not there yet.
    Raises:
        DataError: images that cannot be read (where a cache is made).
        RunError: the cache cannot be written.
    """
    pin = device.type == "cuda"
    streamed = Streamed(resize, image_size, worker_count(workers, device), pin)
    if mode == "none":
        return streamed
    paths = sorted({path for images in sets for path in images.paths})
    size = cache_bytes(len(paths), resize)
    cache = read_cache(folder, paths, resize)
    if cache is None:
        if mode == "auto" and not (make and room_for(folder, size)):
            return streamed
        cache = make_cache(folder, paths, resize, Streamed(resize, resize, worker_count(workers)).decode, report)
    if device.type == "cuda" and (
        mode == "device" or (mode == "auto" and size < torch.cuda.mem_get_info(device)[0] / 4)
    ):
        return Resident(cache, image_size, device)
    return Mapped(cache, image_size, pin)


def find_damaged(sets: Sequence[ImageSet], workers: int | None, report: Reporter) -> dict[Path, str]:
    """{path: what is wrong} of every image that cannot be decoded."""
    paths = list(dict.fromkeys(path for images in sets for path in images.paths))
    small = 8  # pixels: whatever the size, the file is decoded whole
    singly = [[Crop(index, 0, 0)] for index in range(len(paths))]
    damaged: dict[Path, str] = {}
    decoded = Streamed(small, small, worker_count(workers)).decode(paths, singly)
    for number, (path, image) in enumerate(zip(paths, decoded, strict=True), 1):
        if isinstance(image, DataError):
            damaged[path] = image.problems[0]
        if number % 50 == 0 or number == len(paths):
            report(Progress("Checking images", number, len(paths)))
    return damaged


class _Batches:
    """Of images that are decoded already: ``cut(crops, rows)`` takes each crop from its row of the cache."""

    def __init__(
        self,
        images: ImageSet,
        plan: Iterable[list[Crop]],
        cache: PixelCache,
        cut: Callable[[list[Crop], list[int]], Tensor],
        device: torch.device,
    ) -> None:
        self._plan, self._cut, self._device = plan, cut, device
        self._rows, self._labels = cache.rows_of(images.paths), images.labels

    def __iter__(self) -> Iterator[Batch]:
        for crops in self._plan:
            labels = torch.tensor([self._labels[crop.index] for crop in crops]).to(self._device, non_blocking=True)
            yield self._cut(crops, [self._rows[crop.index] for crop in crops]), labels


class _Checked:
    def __init__(self, loader: DataLoader[Batch], patient: bool) -> None:
        self._loader, self._patient = loader, patient

    def __iter__(self) -> Iterator[Batch]:
        problems: list[str] = []
        for batch in self._loader:
            if isinstance(batch, DataError):
                problems += batch.problems
            else:
                yield batch
            if problems and not self._patient:
                break
        if problems:
            raise DataError(*problems)


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
