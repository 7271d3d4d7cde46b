"""Append-only files of embeddings: cached views, search indexes, and the rows of an interrupted ``rkd embed``.

A file starts with a JSON object of all facts that its rows depend on, padded to ``HEADER_BYTES``. Rows of equal size
follow. In a stamped file, an 8-byte stamp before each row identifies its image; a damaged row matches no image. A
partial row at the end, from a killed process, is ignored, so the file is valid at any time.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rkd_cli.data.cache import HEADER_BYTES, file_stamps, free_space
from rkd_cli.data.splits import relative_names
from rkd_cli.errors import RkdError, RunError
from rkd_cli.events import Progress, Reporter
from rkd_cli.runtime.files import atomic_write, check_folder, locked, move_into_place

_AT_ONCE = 1 << 16  # rows to read stamps of
_CPU = torch.device("cpu")
_TYPES = {torch.float16: np.float16, torch.float32: np.float32}

# the type of ``cached_rows``
CacheRows = Callable[
    [Path, dict[str, Any], tuple[int, int], torch.dtype, Callable[[int], Iterator[Tensor]], Reporter, str], Tensor
]


def unfinished(path: Path) -> Path:
    """The file that collects the rows of ``path`` until it is complete."""
    return path.with_name(f".{path.name}.rows.part")


def image_stamps(paths: Sequence[Path], root: Path) -> np.ndarray:
    """(N,) uint64 hashes of each image's name in ``root`` and ``file_stamps``; a DataError if a file is missing."""
    stamps = np.empty(len(paths), np.uint64)
    files = file_stamps(paths)
    for place, name in enumerate(relative_names(paths, root)):
        facts = files[place].tobytes() + name.encode(errors="surrogateescape")
        stamps[place] = int.from_bytes(hashlib.blake2b(facts, digest_size=8).digest())
    return stamps


@dataclass
class Store:
    """An open file with ``done`` rows. It is a ``compress.Rows``: each slice maps only its own part of the file."""

    path: Path
    size: int  # D
    dtype: torch.dtype
    stamped: bool
    device: torch.device
    _file: Any  # unbuffered: on a full disk, closing a buffered file would write again and fail
    done: int = 0
    changed: str = ""  # the facts that differ from those of the file that was here before, if any

    @property
    def _row(self) -> np.dtype[Any]:
        stamp = [("stamp", np.uint64)] if self.stamped else []
        return np.dtype([*stamp, ("embedding", _TYPES[self.dtype], (self.size,))])

    def _mapped(self, start: int, stop: int) -> np.ndarray:
        if start >= stop:
            return np.empty(0, self._row)
        at = HEADER_BYTES + start * self._row.itemsize
        return np.memmap(self.path, self._row, "c", at, (stop - start,))

    @property
    def shape(self) -> tuple[int, int]:
        """(``done``, D)."""
        return self.done, self.size

    def __getitem__(self, rows: slice) -> Tensor:
        start, stop, _ = rows.indices(self.done)
        return torch.from_numpy(self._mapped(start, stop)["embedding"]).to(self.device)

    def take(self, rows: np.ndarray) -> np.ndarray:
        """(K, D) copy of the rows with the indices ``rows``."""
        return np.asarray(self._mapped(0, self.done)["embedding"][rows])

    def append(self, rows: Tensor, stamps: np.ndarray | None = None) -> None:
        """Write (B, D) rows and, in a stamped file, the (B,) stamps of their images. Synchronizes the device.

        The rows survive a kill of the process, but perhaps not a crash of the machine.
        """
        block = np.empty(len(rows), self._row)
        block["embedding"] = rows.to("cpu", self.dtype).numpy()
        if stamps is not None:
            block["stamp"] = stamps ^ _checksums(block["embedding"])
        left = memoryview(block.tobytes())
        while left:
            left = left[self._file.write(left) :]
        self.done += len(rows)

    def rewrite(self, rows: Tensor, stamps: np.ndarray) -> None:
        """Replace the file by one with these rows. This store still reads the old one."""
        self._file.seek(0)
        with atomic_write(self.path) as partial, partial.open("xb", buffering=0) as file:
            file.write(self._file.read(HEADER_BYTES))
            replace(self, _file=file).append(rows, stamps)

    def truncate(self, done: int) -> None:
        """Remove all but the first ``done`` rows."""
        self._file.truncate(HEADER_BYTES + done * self._row.itemsize)
        self.done = done

    def stamps(self) -> np.ndarray:
        """(N,) stamps of the rows; the stamp of a damaged row matches no image."""
        found = [np.empty(0, np.uint64)]
        for start in range(0, self.done, _AT_ONCE):
            block = self._mapped(start, min(start + _AT_ONCE, self.done))
            found.append(block["stamp"] ^ _checksums(block["embedding"]))
        return np.concatenate(found)

    def find(self, stamps: np.ndarray) -> np.ndarray:
        """(N,) row index of each stamp, or -1."""
        own = self.stamps()
        if not len(own):
            return np.full(len(stamps), -1)
        order = own.argsort(kind="stable")
        rows = order[np.maximum(np.searchsorted(own, stamps, side="right", sorter=order) - 1, 0)]
        return np.where(own[rows] == stamps, rows, -1)

    def truncate_to_matching(self, stamps: np.ndarray) -> None:
        """Remove the first row that is not of the image with the same index, and all rows after it."""
        found = self.stamps()[: len(stamps)]
        other = np.flatnonzero(found != stamps[: len(found)])
        same = int(other[0]) if len(other) else len(found)
        if self.done and not same:
            self.changed = "other images"
        self.truncate(same)


def _checksums(rows: np.ndarray) -> np.ndarray:
    """(N,) uint64 checksums of (N, D) float32 rows."""
    words: np.ndarray = np.ascontiguousarray(rows).view(np.uint32)
    return np.asarray(words.sum(axis=1, dtype=np.uint64))


def _header(facts: dict[str, Any], size: int, dtype: torch.dtype, stamped: bool) -> bytes:
    form = {"size": size, "type": str(dtype)} | ({"stamped": True} if stamped else {})
    return json.dumps(facts | form).encode().ljust(HEADER_BYTES)


@contextmanager
def open_store(
    path: Path,
    facts: dict[str, Any],
    size: int,
    dtype: torch.dtype = torch.float32,
    stamped: bool = True,
    device: torch.device = _CPU,
    busy: RkdError | None = None,
) -> Iterator[Store]:
    """Open the file of these facts to append rows. A file of other facts is emptied first.

    Args:
        facts: JSON values of all that the rows depend on except their images; the keys are shown to the user.
        size: D.
        dtype: float16 or float32.
        stamped: whether rows have stamps.
        device: of slices.
        busy: error to raise if another process has the file open; None: the caller holds a lock.
    """
    header = _header(facts, size, dtype, stamped)
    with path.open("a+b", buffering=0) as file:
        if busy:
            _lock(file, busy)
        file.seek(0)
        before = file.read(HEADER_BYTES)
        store = Store(path, size, dtype, stamped, device, file)
        if before != header:
            store.changed = _changed(before, facts)
            file.truncate(0)
            file.write(header)
        store.truncate((file.seek(0, os.SEEK_END) - HEADER_BYTES) // store._row.itemsize)
        yield store


def _lock(file: Any, busy: RkdError) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise busy from None
    except OSError:  # some network file systems have no locks
        return


def _changed(before: bytes, facts: dict[str, Any]) -> str:
    """The names of the facts that differ from the header ``before``; empty for a new file."""
    old: object = None
    with suppress(ValueError):
        old = json.loads(before)
    if not before:
        return ""
    if not isinstance(old, dict):
        return "a damaged file"
    return " and ".join(name for name, value in facts.items() if old.get(name) != value) or "another version"


def cached_rows(
    folder: Path,
    facts: dict[str, Any],
    shape: tuple[int, int],
    dtype: torch.dtype,
    compute: Callable[[int], Iterator[Tensor]],
    report: Reporter,
    what: str,
) -> Tensor:
    """(R, D) rows, memory-mapped from the file of these facts, computed first if it is not complete.

    An interrupted computation resumes. Another process that needs the same file waits for it.

    Args:
        folder: the cache folder.
        facts: JSON values of all that the rows depend on, and what ``rkd cache`` shows.
        shape: (R, D).
        dtype: float16 or float32.
        compute: (index of the first missing row) -> blocks (B, D) of rows.
        what: the name of the work, in progress.
    Raises:
        RunError: the file cannot be written.
    """
    path, facts = _named(folder, facts, shape, dtype)
    count, size = shape
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(path):
            if not _is_whole(path, facts, shape, dtype):
                _check_room(path, shape, dtype)
                with open_store(unfinished(path), facts, size, dtype, stamped=False) as store:
                    for rows in compute(store.done) if store.done < count else ():
                        store.append(rows)
                        report(Progress(what, store.done, count, "views"))
                move_into_place(unfinished(path), path)
            return _mapped(path, shape, dtype)
    except OSError as error:
        raise _unwritable(path, error) from None


def read_cached(folder: Path, facts: dict[str, Any], shape: tuple[int, int], dtype: torch.dtype) -> Tensor | None:
    """(R, D) rows from the file of these facts, or None if it is not complete."""
    path, facts = _named(folder, facts, shape, dtype)
    return _mapped(path, shape, dtype) if _is_whole(path, facts, shape, dtype) else None


def cached_bytes(shape: tuple[int, int], dtype: torch.dtype) -> int:
    """The size of the file of ``cached_rows``."""
    return HEADER_BYTES + shape[0] * shape[1] * dtype.itemsize


def check_cached(folder: Path, facts: dict[str, Any], shape: tuple[int, int], dtype: torch.dtype) -> Path:
    """The path that ``cached_rows`` would write; a RunError if it cannot be written."""
    path, _ = _named(folder, facts, shape, dtype)
    try:
        check_folder(folder)
    except OSError as error:
        raise _unwritable(path, error) from None
    _check_room(path, shape, dtype)
    return path


def _check_room(path: Path, shape: tuple[int, int], dtype: torch.dtype) -> None:
    size, free = cached_bytes(shape, dtype), free_space(path.parent)
    if free < size:
        raise RunError(
            f"{path}: needs {size / 1e6:,.0f} MB, and {free / 1e6:,.0f} MB are free. Choose another --cache-dir, or "
            "fewer views."
        )


def _unwritable(path: Path, error: OSError) -> RunError:
    return RunError(f"{path}: cannot be written ({error.strerror or error}). Choose another --cache-dir.")


def _named(
    folder: Path, facts: dict[str, Any], shape: tuple[int, int], dtype: torch.dtype
) -> tuple[Path, dict[str, Any]]:
    """The path of the file of these facts, and the facts with the number of rows."""
    facts = facts | {"rows": shape[0]}
    name = hashlib.sha256(_header(facts, shape[1], dtype, False).rstrip()).hexdigest()[:12]
    return folder / f"{facts['resize']}-{name}.vectors", facts


def _is_whole(path: Path, facts: dict[str, Any], shape: tuple[int, int], dtype: torch.dtype) -> bool:
    header = _header(facts, shape[1], dtype, False)
    with suppress(FileNotFoundError, NotADirectoryError), path.open("rb") as file:
        return os.fstat(file.fileno()).st_size == cached_bytes(shape, dtype) and file.read(len(header)) == header
    return False


def _mapped(path: Path, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    file = np.memmap(path, np.uint8, "c")
    return torch.from_numpy(file)[HEADER_BYTES:].view(dtype).view(shape)
