"""Every image decoded and resized once in its life: one memory-mapped file of uint8 pixels."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import PIL
import torch
from filelock import FileLock
from PIL import features
from torch import Tensor

from rkd_cli.data.images import Crop
from rkd_cli.errors import DataError, RunError
from rkd_cli.events import Note, Progress, Reporter

CACHE_FOLDER = ".rkd-cache"  # inside --data
_HEADER = 4096  # bytes before the pixels: a line of JSON, filled up with blanks
_BATCH = 64  # images that cross from a worker at once

# images of a list of crops, and the problems with those that cannot be read, from as many workers as there are
Decode = Callable[[Sequence[Path], Iterable[list[Crop]]], Iterator[Tensor | DataError]]


@dataclass(frozen=True)
class PixelCache:
    """(N, R, R, 3) uint8 of a set's images, and where in it each image stands."""

    pixels: Tensor
    row: dict[Path, int]
    path: Path

    def rows_of(self, paths: Sequence[Path]) -> list[int]:
        """Where the images of ``paths`` stand."""
        return [self.row[path] for path in paths]


def cache_path(folder: Path, paths: Sequence[Path], resize: int) -> Path:
    """The file for these images at this size: one place, whatever becomes of the images."""
    names = hashlib.sha256("\n".join(map(str, _relative(paths, folder.parent))).encode()).hexdigest()
    return folder / f"{resize}-{names[:12]}.pixels"


def cache_bytes(images: int, resize: int) -> int:
    """What the file takes of the disk."""
    return _HEADER + images * resize * resize * 3


def read_cache(folder: Path, paths: Sequence[Path], resize: int) -> PixelCache | None:
    """The cache of exactly these files at this size, or None where there is none that is valid.

    It is valid for the names, sizes and times of change that the files had when it was made, and for the versions of
    the libraries that decoded them.
    """
    path = cache_path(folder, paths, resize)
    size = cache_bytes(len(paths), resize)
    try:
        if path.stat().st_size != size:
            return None
        with path.open("rb") as file:
            if file.read(_HEADER) != _header(paths, resize):
                return None
    except OSError:
        return None
    mapped = torch.from_file(str(path), size=size, dtype=torch.uint8)  # private, page by page, when it is touched
    pixels = mapped[_HEADER:].view(len(paths), resize, resize, 3)
    return PixelCache(pixels, {p: row for row, p in enumerate(paths)}, path)


def make_cache(folder: Path, paths: Sequence[Path], resize: int, decode: Decode, report: Reporter) -> PixelCache:
    """``read_cache``, after making the file where there is no valid one.

    Another process may read the old file meanwhile, and one that wants the same file waits for it.

    Raises:
        DataError: one line for every image that cannot be read.
        RunError: the file cannot be written.
    """
    path = cache_path(folder, paths, resize)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            found = read_cache(folder, paths, resize)
            if found is None:
                partial = path.with_suffix(".part")
                try:
                    _write(partial, paths, resize, decode, report)
                    partial.replace(path)
                finally:
                    partial.unlink(missing_ok=True)
                found = read_cache(folder, paths, resize)
    except OSError as error:
        raise RunError(
            f"{path}: the cache cannot be written ({error.strerror or error}): use --cache none, or another --cache-dir"
        ) from None
    if found is None:
        raise DataError(f"{folder}: the images changed while they were decoded: start again")
    return found


def room_for(folder: Path, size: int) -> bool:
    """Whether a file of ``size`` bytes may be put into ``folder`` without asking: it can be written, and more than as
    much again stays free."""
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    return os.access(there, os.W_OK) and shutil.disk_usage(there).free > 2 * size


def _write(partial: Path, paths: Sequence[Path], resize: int, decode: Decode, report: Reporter) -> None:
    size = cache_bytes(len(paths), resize)
    report(Note(f"decoding {len(paths):,} images once, into {partial.with_suffix('.pixels')} ({size / 1e6:,.0f} MB)"))
    free = shutil.disk_usage(partial.parent).free
    if free < size:
        raise RunError(
            f"{partial.parent}: the cache takes {size / 1e6:,.0f} MB and {free / 1e6:,.0f} are free: use --cache none, "
            "or another --cache-dir"
        )
    whole = [Crop(index, 0, 0) for index in range(len(paths))]
    plan = [whole[start : start + _BATCH] for start in range(0, len(whole), _BATCH)]
    header = _header(paths, resize)
    problems: list[str] = []
    with partial.open("wb") as file:
        file.write(header)
        for number, images in enumerate(decode(paths, plan), 1):
            if isinstance(images, DataError):
                problems += images.problems
            elif not problems:
                file.write(images.permute(0, 2, 3, 1).contiguous().numpy().data)  # (B, 3, R, R) -> (B, R, R, 3)
            report(Progress("Decoding images", min(number * _BATCH, len(paths)), len(paths)))
        if problems:
            raise DataError(*problems)
        file.flush()
        os.fsync(file.fileno())


def _header(paths: Sequence[Path], resize: int) -> bytes:
    stamp = hashlib.sha256()
    for path in paths:
        try:
            stat = path.stat()
        except OSError:
            raise DataError(f"{path}: the image is gone since the data set was listed") from None
        stamp.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    decoder = f"pillow {PIL.__version__}, libjpeg-turbo {features.version('libjpeg_turbo')}"
    facts = {"rkd pixels": 1, "images": len(paths), "resize": resize, "filter": "bilinear", "decoder": decoder}
    return json.dumps(facts | {"stamp": stamp.hexdigest()}).encode().ljust(_HEADER)


def _relative(paths: Sequence[Path], root: Path) -> list[Path]:
    return [path.relative_to(root) if path.is_relative_to(root) else path for path in paths]
