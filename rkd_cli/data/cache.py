"""Every image decoded and resized once in its life: one memory-mapped file of uint8 pixels."""

from __future__ import annotations

import hashlib
import json
import os
import re
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
from platformdirs import user_cache_path
from torch import Tensor

from rkd_cli.data.decode import AS_VIEWED, DECODER, HEIC, HEIC_READER, Decoding, load_resized
from rkd_cli.data.workers import in_workers
from rkd_cli.errors import DataError, RunError
from rkd_cli.events import Note, Progress, Reporter
from rkd_cli.runtime.files import check_folder, locked, nearest, sweep, written_aside

HEADER_BYTES = 4096  # bytes before the pixels: a line of JSON, filled up with blanks
_CHUNK = 64  # images that a worker decodes at once
_NAME = re.compile(r"(\d+)-[0-9a-f]{12}\.(pixels|vectors|index)")


@dataclass(frozen=True)
class PixelCache:
    """(N, R, R, 3) uint8 of a set's images, and where in it each image stands."""

    pixels: Tensor
    row: dict[Path, int]
    path: Path

    def rows_of(self, paths: Sequence[Path]) -> list[int]:
        """Where the images of ``paths`` stand."""
        return [self.row[path] for path in paths]


@dataclass(frozen=True)
class CacheFile:
    """A file of decoded images as ``rkd cache`` shows it."""

    path: Path
    images: str  # the folder that they are in
    count: int
    resize: int
    bytes: int


def default_cache_folder() -> Path:
    """``RKD_CACHE_DIR``, or ``rkd`` in the user's cache folder: shared by all runs, outside of everybody's images."""
    named = os.environ.get("RKD_CACHE_DIR")
    return Path(named) if named else user_cache_path("rkd", appauthor=False)


def cache_path(folder: Path, paths: Sequence[Path], resize: int, decoding: Decoding = AS_VIEWED) -> Path:
    """The file for these images as such squares: one place, whatever becomes of the images."""
    folders = _folders(paths)
    located = "\n".join(str(folders[path.parent] / path.name) for path in paths)
    if decoding.fit != "square":
        located += f"\n{decoding.fit}"
    names = hashlib.sha256(located.encode(errors="surrogateescape")).hexdigest()
    return folder / f"{resize}-{names[:12]}.pixels"


def cache_bytes(images: int, resize: int) -> int:
    """What the file takes of the disk."""
    return HEADER_BYTES + images * resize * resize * 3


def read_cache(folder: Path, paths: Sequence[Path], resize: int, decoding: Decoding = AS_VIEWED) -> PixelCache | None:
    """The cache of exactly these files as such squares, or None where there is none that is valid.

    It is valid for the places, sizes and times of change that the files had when it was made, and for the versions of
    the libraries that decoded them.

    Raises:
        DataError: an image is gone.
    """
    path = cache_path(folder, paths, resize, decoding)
    size = cache_bytes(len(paths), resize)
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size != size or file.read(HEADER_BYTES) != _header(paths, resize, decoding):
                return None
            # of the very file that was looked at, should it be cleared meanwhile; private, page by page, when touched
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
    decoding: Decoding = AS_VIEWED,
) -> PixelCache:
    """``read_cache``, after making the file where there is no valid one.

    Another process may read the old file meanwhile, and one that wants the same file waits for it.

    Raises:
        DataError: one line for every image that cannot be read.
        RunError: the file cannot be written, or a worker was killed.
    """
    path = cache_path(folder, paths, resize, decoding)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(path):
            found = read_cache(folder, paths, resize, decoding)
            if found is None:
                sweep(path)
                with written_aside(path) as partial:
                    _write(partial, path, paths, resize, workers, report, decoding)
                found = read_cache(folder, paths, resize, decoding)
    except OSError as error:
        raise _unwritable(path, error) from None
    if found is None:
        raise DataError(f"{folder}: the images changed while they were decoded: start again")
    return found


def check_cache(folder: Path, paths: Sequence[Path], resize: int, decoding: Decoding = AS_VIEWED) -> None:
    """That ``make_cache`` can write its file, without doing it.

    Raises:
        RunError: it cannot.
    """
    path = cache_path(folder, paths, resize, decoding)
    try:
        check_folder(folder)
    except OSError as error:
        raise _unwritable(path, error) from None
    _check_room(folder, cache_bytes(len(paths), resize))


def _unwritable(path: Path, error: OSError) -> RunError:
    reason = error.strerror or error
    return RunError(f"{path}: the cache cannot be written ({reason}): use --cache none, or another --cache-dir")


def _check_room(folder: Path, size: int) -> None:
    free = free_space(folder)
    if free < size:
        raise RunError(
            f"{folder}: the cache takes {size / 1e6:,.0f} MB and {free / 1e6:,.0f} are free: use --cache none, "
            "or another --cache-dir"
        )


def file_stamps(paths: Sequence[Path]) -> np.ndarray:
    """(N,) uint64, which change when a file is written, replaced or swapped with another: of size, mtime, ctime, inode.

    Programs can set the mtime of a file, but neither its ctime nor its inode. A copy has another stamp.

    Raises:
        DataError: a file is missing.
    """
    stamps = np.empty(len(paths), np.uint64)
    for place, path in enumerate(paths):
        try:
            stat = path.stat()
        except OSError:
            raise DataError(
                f"{path}: no such file; it was deleted since the folder was read, or is a broken link: run this again"
            ) from None
        facts = f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_ino}".encode()
        stamps[place] = int.from_bytes(hashlib.blake2b(facts, digest_size=8).digest())
    return stamps


def pixel_facts(paths: Sequence[Path], resize: int, decoding: Decoding = AS_VIEWED) -> dict[str, Any]:
    """All that the decoded pixels of these files are a function of, and the folder that they are in.

    Raises:
        DataError: an image is gone.
    """
    stamp = hashlib.sha256("\n".join(path.name for path in paths).encode(errors="surrogateescape"))
    stamp.update(file_stamps(paths).tobytes())
    decoder = f"pillow {PIL.__version__}, libjpeg-turbo {features.version('libjpeg_turbo')}"
    decoder += f", littlecms2 {features.version('littlecms2')}"
    if any(path.suffix.lower() in HEIC for path in paths):
        decoder += f", {HEIC_READER}"
    folder = os.path.commonpath(_folders(paths).values())[-500:]
    facts = {"rkd pixels": DECODER, "images": len(paths), "resize": resize, "filter": "bilinear", "decoder": decoder}
    shown = {"fit": decoding.fit, "published": decoding.published}  # the limit of pixels changes none
    return facts | shown | {"folder": folder, "stamp": stamp.hexdigest()}


def room_for(folder: Path, size: int) -> bool:
    """Whether a file of ``size`` bytes may be put into ``folder`` without asking: it can be written, and more than as
    much again stays free."""
    return os.access(nearest(folder), os.W_OK) and free_space(folder) > 2 * size


def free_space(folder: Path) -> int:
    """Bytes free on the disk that a folder is on, or will be once it is made."""
    return shutil.disk_usage(nearest(folder)).free


def list_caches(folder: Path) -> list[CacheFile]:
    """The files of decoded images in a folder, whatever made them; none where there is no such folder.

    Raises:
        RunError: the folder cannot be read.
    """
    found = []
    try:
        for path in sorted(folder.iterdir()) if folder.exists() else ():
            if named := _NAME.fullmatch(path.name):
                where, count = _facts(path)
                found.append(CacheFile(path, where, count, int(named[1]), path.stat().st_size))
    except OSError as error:
        raise RunError(f"{folder}: cannot be read ({error.strerror})") from None
    return found


def clear_caches(folder: Path) -> list[CacheFile]:
    """Remove the files of decoded images in a folder, and what is left of some that were never finished.

    Whoever reads one now keeps what is mapped; one that is being made stays.

    Returns:
        what was removed.
    Raises:
        RunError: something cannot be removed.
    """
    removed = []
    busy = RunError("")
    partials = folder.glob(".*.part") if folder.exists() else ()
    unfinished = {folder / path.name.removeprefix(".").rsplit(".", 2)[0] for path in partials}
    unfinished = {path for path in unfinished if _NAME.fullmatch(path.name)}
    found = {file.path: file for file in list_caches(folder)}
    for path in sorted({*found, *unfinished}):
        try:
            with locked(path, busy):
                sweep(path)
                path.with_name(f".{path.name}.rows.part").unlink(missing_ok=True)
                path.unlink(missing_ok=True)
        except RunError:  # of another process, which is making it
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
    report(Note(f"decoding {len(paths):,} images once, into {path} ({size / 1e6:,.0f} MB)"))
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
    """Decode images straight into their place in the file; returns the problems, for the file is then of no use."""
    problems: list[str] = []
    try:
        with file.open("r+b") as pixels:
            pixels.seek(cache_bytes(rows.start, resize))
            for row in rows:
                try:
                    pixels.write(load_resized(paths[row], resize, decoding).data)
                except DataError as error:
                    problems += error.problems
    except OSError as error:  # a value, for raised it would arrive wrapped in a worker's traceback
        return error
    return problems


def _header(paths: Sequence[Path], resize: int, decoding: Decoding) -> bytes:
    return json.dumps(pixel_facts(paths, resize, decoding)).encode().ljust(HEADER_BYTES)


def _facts(path: Path) -> tuple[str, int]:
    """The folder and the number of the images, of a header that may be damaged."""
    try:
        with path.open("rb") as file:
            facts = json.loads(file.read(HEADER_BYTES))
        if path.suffix == ".index":  # of `rkd search`, which grows
            return str(facts["folder"]), (path.stat().st_size - HEADER_BYTES) // int(facts["row bytes"])
        return str(facts["folder"]), int(facts["images"])
    except (ValueError, TypeError, KeyError, ZeroDivisionError):  # made anew by whoever needs it
        return "?", 0


def _folders(paths: Sequence[Path]) -> dict[Path, Path]:
    """{folder as it is spelled: where it truly lies}; asked once a folder, for once an image would take seconds."""
    return {folder: folder.resolve() for folder in {path.parent for path in paths}}
