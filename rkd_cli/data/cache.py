"""Cache of decoded and resized images, in a memory-mapped file of uint8 pixels."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from PIL import features
from torch import Tensor

from rkd_cli.data.decode import AS_DISPLAYED, DECODER, Decoding, load_resized
from rkd_cli.data.extensions import HEIC, HEIC_READER
from rkd_cli.data.members import image_facts
from rkd_cli.data.workers import in_workers
from rkd_cli.errors import DataError, RunError
from rkd_cli.events import Note, Progress, Reporter
from rkd_cli.runtime.files import CACHE_FILE, atomic_write, check_folder, locked, nearest, remove_partials

HEADER_BYTES = 4096  # before the pixels: JSON, padded with spaces
_CHUNK = 64  # images per task of a worker


@dataclass(frozen=True)
class PixelCache:
    """(N, R, R, 3) uint8 pixels, and the row of each image."""

    pixels: Tensor
    row: dict[Path, int]
    path: Path

    def rows_of(self, paths: Sequence[Path]) -> list[int]:
        """The rows of the images of ``paths``."""
        return [self.row[path] for path in paths]


@dataclass(frozen=True)
class CacheFile:
    """A cache file as ``rkd cache`` shows it."""

    path: Path
    images: str  # folder of the images
    count: int
    resize: int
    bytes: int


def cache_path(folder: Path, paths: Sequence[Path], resize: int, decoding: Decoding = AS_DISPLAYED) -> Path:
    """The cache file for these images at this size. It depends on their paths only, not on their content."""
    folders = _folders(paths)
    located = "\n".join(str(folders[path.parent] / path.name) for path in paths)
    if decoding.fit != "square":
        located += f"\n{decoding.fit}"
    located += boxes_text(paths, decoding)
    names = hashlib.sha256(located.encode(errors="surrogateescape")).hexdigest()
    return folder / f"{resize}-{names[:12]}.pixels"


def cache_bytes(images: int, resize: int) -> int:
    """The size of the file."""
    return HEADER_BYTES + images * resize * resize * 3


def read_cache(
    folder: Path, paths: Sequence[Path], resize: int, decoding: Decoding = AS_DISPLAYED
) -> PixelCache | None:
    """The cache of exactly these files at this size, or None if there is no valid one.

    It is valid while paths, sizes and modification times of the files and the versions of the decoding libraries are
    unchanged.
    """
    path = cache_path(folder, paths, resize, decoding)
    size = cache_bytes(len(paths), resize)
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size != size or file.read(HEADER_BYTES) != _header(paths, resize, decoding):
                return None
            # map the open file, because the path may be cleared meanwhile; copy-on-write
            mapped = torch.from_numpy(np.memmap(file, np.uint8, "c", shape=(size,)))
    except OSError:
        return None
    pixels = mapped[HEADER_BYTES:].view(len(paths), resize, resize, 3)
    return PixelCache(pixels, {p: row for row, p in enumerate(paths)}, path)


def make_cache(
    folder: Path,
    paths: Sequence[Path],
    resize: int,
    workers: int,
    report: Reporter,
    decoding: Decoding = AS_DISPLAYED,
) -> PixelCache:
    """``read_cache``, after creating the file if there is no valid one.

    Another process that needs the same file waits for it. A DataError has one line for every unreadable image.
    """
    path = cache_path(folder, paths, resize, decoding)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(path):
            found = read_cache(folder, paths, resize, decoding)
            if found is None:
                remove_partials(path)
                with atomic_write(path) as partial:
                    _write(partial, path, paths, resize, workers, report, decoding)
                found = read_cache(folder, paths, resize, decoding)
    except OSError as error:
        raise _unwritable(path, error) from None
    if found is None:
        raise DataError(f"{folder}: images changed while they were decoded. Run the command again.")
    return found


def check_cache(folder: Path, paths: Sequence[Path], resize: int, decoding: Decoding = AS_DISPLAYED) -> None:
    """Raise a RunError if ``make_cache`` cannot write its file."""
    path = cache_path(folder, paths, resize, decoding)
    try:
        check_folder(folder)
    except OSError as error:
        raise _unwritable(path, error) from None
    _check_room(folder, cache_bytes(len(paths), resize))


def _unwritable(path: Path, error: OSError) -> RunError:
    reason = error.strerror or error
    return RunError(f"{path}: the cache cannot be written ({reason}). Use --cache none, or another --cache-dir.")


def _check_room(folder: Path, size: int) -> None:
    free = free_space(folder)
    if free < size:
        raise RunError(
            f"{folder}: the cache needs {size / 1e6:,.0f} MB, and {free / 1e6:,.0f} MB are free. Use --cache none, "
            "or another --cache-dir."
        )


def file_stamps(paths: Sequence[Path]) -> np.ndarray:
    """(N,) uint64 digests of size, mtime, ctime and inode, which change if a file is written, replaced or swapped.

    mtime alone is not enough, because programs can set it. A copy of a file has another stamp.
    """
    stamps = np.empty(len(paths), np.uint64)
    for place, path in enumerate(paths):
        try:
            facts = image_facts(path)
        except OSError:
            raise DataError(
                f"{path}: no such file. It was deleted meanwhile, or is a broken link. Run the command again."
            ) from None
        stamps[place] = int.from_bytes(hashlib.blake2b(facts.encode(), digest_size=8).digest())
    return stamps


def pixel_facts(paths: Sequence[Path], resize: int, decoding: Decoding = AS_DISPLAYED) -> dict[str, Any]:
    """Everything that determines the decoded pixels of these files, and their folder."""
    stamp = hashlib.sha256("\n".join(path.name for path in paths).encode(errors="surrogateescape"))
    stamp.update(file_stamps(paths).tobytes())
    decoder = f"pillow {PIL.__version__}, libjpeg-turbo {features.version('libjpeg_turbo')}"
    decoder += f", littlecms2 {features.version('littlecms2')}"
    if any(path.suffix.lower() in HEIC for path in paths):
        decoder += f", {HEIC_READER}"
    folder = os.path.commonpath(_folders(paths).values())[-500:]
    facts = {"rkd pixels": DECODER, "images": len(paths), "resize": resize, "filter": "bilinear", "decoder": decoder}
    shown = {"fit": decoding.fit, "published": decoding.published}  # max_pixels changes no pixels
    stamp.update(boxes_text(paths, decoding).encode())
    return facts | shown | {"folder": folder, "stamp": stamp.hexdigest()}


def boxes_text(paths: Sequence[Path], decoding: Decoding) -> str:
    """The boxes of these images, for digests; empty without any."""
    boxes = decoding.boxes
    return "\n".join(str(boxes[path][:4] if path in boxes else "") for path in paths) if boxes else ""


def room_for(folder: Path, size: int) -> bool:
    """Whether a file of ``size`` bytes can be written into ``folder`` and takes less than half of the free space."""
    return os.access(nearest(folder), os.W_OK) and free_space(folder) > 2 * size


def free_space(folder: Path) -> int:
    """Free bytes on the disk of a folder, which may not exist yet."""
    return shutil.disk_usage(nearest(folder)).free


def list_caches(folder: Path) -> list[CacheFile]:
    """The cache files in a folder, which may not exist."""
    found = []
    try:
        for path in sorted(folder.iterdir()) if folder.exists() else ():
            if named := CACHE_FILE.fullmatch(path.name):
                where, count = _facts(path)
                found.append(CacheFile(path, where, count, int(named[1]), path.stat().st_size))
    except OSError as error:
        raise RunError(f"{folder}: cannot be read ({error.strerror})") from None
    return found


def clear_caches(folder: Path) -> list[CacheFile]:
    """Remove and return the cache files in a folder, and remove unfinished ones.

    Files that another process is writing are skipped; processes that have mapped a file can still read it.
    """
    removed = []
    busy = RunError("")
    partials = folder.glob(".*.part") if folder.exists() else ()
    unfinished = {folder / path.name.removeprefix(".").rsplit(".", 2)[0] for path in partials}
    unfinished = {path for path in unfinished if CACHE_FILE.fullmatch(path.name)}
    found = {file.path: file for file in list_caches(folder)}
    for path in sorted({*found, *unfinished}):
        try:
            with locked(path, busy):
                remove_partials(path)
                path.with_name(f".{path.name}.rows.part").unlink(missing_ok=True)
                path.unlink(missing_ok=True)
        except RunError:  # another process is writing it
            continue
        except OSError as error:
            raise RunError(f"{path}: cannot be removed ({error.strerror})") from None
        if path in found:
            removed.append(found[path])
    return removed


def _write(
    partial_file: Path,
    path: Path,
    paths: Sequence[Path],
    resize: int,
    workers: int,
    report: Reporter,
    decoding: Decoding,
) -> None:
    size = cache_bytes(len(paths), resize)
    report(Note(f"decoding {len(paths):,} images once into the cache {path} ({size / 1e6:,.0f} MB)"))
    _check_room(path.parent, size)
    with partial_file.open("wb") as file:
        file.write(_header(paths, resize, decoding))
        file.truncate(size)
    problems: list[str] = []
    chunks = [range(start, min(start + _CHUNK, len(paths))) for start in range(0, len(paths), _CHUNK)]
    results = in_workers(partial(_write_rows, partial_file, paths, resize, decoding), chunks, workers)
    for rows, result in zip(chunks, results, strict=True):
        if isinstance(result, OSError):
            raise result
        problems += result
        report(Progress("Decoding images", rows.stop, len(paths)))
    if problems:
        raise DataError(*problems)


def _write_rows(file: Path, paths: Sequence[Path], resize: int, decoding: Decoding, rows: range) -> list[str] | OSError:
    """Decode images into their rows of the file; returns the errors."""
    problems: list[str] = []
    try:
        with file.open("r+b") as pixels:
            pixels.seek(cache_bytes(rows.start, resize))
            for row in rows:
                try:
                    pixels.write(load_resized(paths[row], resize, decoding).data)
                except DataError as error:
                    problems += error.problems
    except OSError as error:  # returned: DataLoader would wrap a raised one in the worker's traceback
        return error
    return problems


def _header(paths: Sequence[Path], resize: int, decoding: Decoding) -> bytes:
    return json.dumps(pixel_facts(paths, resize, decoding)).encode().ljust(HEADER_BYTES)


def _facts(path: Path) -> tuple[str, int]:
    """The folder and the number of images from a header, which may be damaged."""
    try:
        with path.open("rb") as file:
            facts = json.loads(file.read(HEADER_BYTES))
        if path.suffix == ".index":  # of `rkd search`, which grows
            return str(facts["folder"]), (path.stat().st_size - HEADER_BYTES) // int(facts["row bytes"])
        return str(facts["folder"]), int(facts["images"])
    except (ValueError, TypeError, KeyError, ZeroDivisionError):  # recreated when needed
        return "?", 0


def _folders(paths: Sequence[Path]) -> dict[Path, Path]:
    """{folder: its resolved path}, because resolving every image would take seconds."""
    return {folder: folder.resolve() for folder in {path.parent for path in paths}}
