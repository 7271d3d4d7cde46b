"""Embeddings in a file that only grows: cached views, the index of a search, what an interrupted embed has done.

A file begins with a JSON object of what its rows are a function of, padded to ``HEADER_BYTES``. Rows of one size
follow. In a stamped file each has 8 bytes before it that tell which image it is of; a damaged row is of none. Half a
row at the end, which a killed process leaves, does not count, so a file is whole at any moment.
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

_AT_ONCE = 1 << 16  # rows whose stamps are read
_CPU = torch.device("cpu")
_TYPES = {torch.float16: np.float16, torch.float32: np.float32}

# ``cached_rows``
CacheRows = Callable[
    [Path, dict[str, Any], tuple[int, int], torch.dtype, Callable[[int], Iterator[Tensor]], Reporter, str], Tensor
]


def unfinished(path: Path) -> Path:
    """Where the rows of ``path`` are until all are there."""
    return path.with_name(f".{path.name}.rows.part")


def image_stamps(paths: Sequence[Path], root: Path) -> np.ndarray:
    """(N,) uint64: of the name below ``root`` and the ``file_stamps`` of each image.

    Raises:
        DataError: one is gone.
    """
    stamps = np.empty(len(paths), np.uint64)
    files = file_stamps(paths)
    for place, name in enumerate(relative_names(paths, root)):
        facts = files[place].tobytes() + name.encode(errors="surrogateescape")
        stamps[place] = int.from_bytes(hashlib.blake2b(facts, digest_size=8).digest())
    return stamps


@dataclass
class Store:
    """(N, D) rows, of which ``done`` are there; the others are to be appended.

    ``shape`` and rows by slices, as ``compress.Rows`` has them: each slice maps its own pages and lets go of them, so
    that the memory of a pass over millions is that of one.
    """

    path: Path
    size: int  # D
    dtype: torch.dtype
    stamped: bool
    device: torch.device
    _file: Any  # not buffered: closing a buffer would try again to write what a full disk refused
    done: int = 0
    changed: str = ""  # what is no longer as it was when another file was begun here; empty where none was, or all is

    @property
    def _row(self) -> np.dtype[Any]:
        stamp = [("stamp", np.uint64)] if self.stamped else []
        return np.dtype([*stamp, ("embedding", _TYPES[self.dtype], (self.size,))])

    def _mapped(self, start: int, stop: int) -> np.ndarray:
        if start >= stop:
            return np.empty(0, self._row)
        at = HEADER_BYTES + start * self._row.itemsize
        return np.memmap(self.path, self._row, "c", at, (stop - start,))  # private: nothing writes it

    @property
    def shape(self) -> tuple[int, int]:
        """Rows that are there, and D."""
        return self.done, self.size

    def __getitem__(self, rows: slice) -> Tensor:
        start, stop, _ = rows.indices(self.done)
        return torch.from_numpy(self._mapped(start, stop)["embedding"]).to(self.device)

    def take(self, rows: np.ndarray) -> np.ndarray:
        """(K, D) of the rows numbered ``rows``, in memory."""
        return np.asarray(self._mapped(0, self.done)["embedding"][rows])

    def append(self, rows: Tensor, stamps: np.ndarray | None = None) -> None:
        """Add (B, D) rows and, in a stamped file, the (B,) stamps of their images.

        A process that is killed afterwards loses none of them; a machine that stops may.

        Raises:
            OSError: the disk is full.
        """
        block = np.empty(len(rows), self._row)
        block["embedding"] = rows.to("cpu", self.dtype).numpy()  # a sync
        if stamps is not None:
            block["stamp"] = stamps ^ _sums(block["embedding"])
        left = memoryview(block.tobytes())
        while left:
            left = left[self._file.write(left) :]
        self.done += len(rows)

    def rewrite(self, rows: Tensor, stamps: np.ndarray) -> None:
        """Have these rows alone in the file, for the next one who opens it.

        Raises:
            OSError: the disk is full; the file is what it was.
        """
        self._file.seek(0)
        with atomic_write(self.path) as partial, partial.open("xb", buffering=0) as file:
            file.write(self._file.read(HEADER_BYTES))
            replace(self, _file=file).append(rows, stamps)

    def cut(self, done: int) -> None:
        """Keep the first rows alone."""
        self._file.truncate(HEADER_BYTES + done * self._row.itemsize)
        self.done = done

    def stamps(self) -> np.ndarray:
        """(N,) of the rows; that of a damaged row is no image's."""
        found = [np.empty(0, np.uint64)]
        for start in range(0, self.done, _AT_ONCE):
            block = self._mapped(start, min(start + _AT_ONCE, self.done))
            found.append(block["stamp"] ^ _sums(block["embedding"]))
        return np.concatenate(found)

    def find(self, stamps: np.ndarray) -> np.ndarray:
        """(N,) the row of each stamp, -1 where there is none."""
        own = self.stamps()
        if not len(own):
            return np.full(len(stamps), -1)
        order = own.argsort(kind="stable")
        rows = order[np.maximum(np.searchsorted(own, stamps, side="right", sorter=order) - 1, 0)]
        return np.where(own[rows] == stamps, rows, -1)

    def keep_same(self, stamps: np.ndarray) -> None:
        """Keep those of the first rows alone that are of these images, in this order."""
        found = self.stamps()[: len(stamps)]
        other = np.flatnonzero(found != stamps[: len(found)])
        same = int(other[0]) if len(other) else len(found)
        if self.done and not same:
            self.changed = "other images"
        self.cut(same)


def _sums(rows: np.ndarray) -> np.ndarray:
    """(N,) uint64, which change with any number of a (N, D) float32 row."""
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
    """The file that was begun for these facts, or else a new one, to be appended to.

    Args:
        path: of the file.
        facts: all that the rows are a function of beside their images, by names that a person understands; JSON.
        size: D.
        dtype: float16 or float32.
        stamped: whether each row says of which image it is.
        device: where slices go.
        busy: raised where another process has the file open; None: the caller sees to it that none has.
    Raises:
        RkdError: ``busy``.
        OSError: it cannot be written.
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
        store.cut((file.seek(0, os.SEEK_END) - HEADER_BYTES) // store._row.itemsize)
        yield store


def _lock(file: Any, busy: RkdError) -> None:
    try:
        import fcntl
    except ImportError:  # this system has no such locks
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise busy from None
    except OSError:  # nor has this folder, over some networks
        return


def _changed(before: bytes, facts: dict[str, Any]) -> str:
    old: object = None
    with suppress(ValueError):
        old = json.loads(before)
    if not before:
        return ""
    if not isinstance(old, dict):
        return "its beginning"
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
    """(R, D) rows, memory-mapped from the file that was made for these facts, or else computed into it.

    Stopped or killed, the work resumes where it stood; another process that wants the same file waits for it.

    Args:
        folder: of caches.
        facts: all that the rows are a function of, and what ``rkd cache`` shows; JSON.
        shape: R and D.
        dtype: float16 or float32.
        compute: (first row) -> the rows from there on, (B, D) at a time.
        report: is told how far it is.
        what: the name of this work.
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
    """(R, D) rows from the file that was made for these facts, or None where there is none that is whole."""
    path, facts = _named(folder, facts, shape, dtype)
    return _mapped(path, shape, dtype) if _is_whole(path, facts, shape, dtype) else None


def cached_bytes(shape: tuple[int, int], dtype: torch.dtype) -> int:
    """What the file takes of the disk."""
    return HEADER_BYTES + shape[0] * shape[1] * dtype.itemsize


def check_cached(folder: Path, facts: dict[str, Any], shape: tuple[int, int], dtype: torch.dtype) -> Path:
    """The file that the rows can be written into, without doing it.

    Raises:
        RunError: they cannot.
    """
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
            f"{path}: takes {size / 1e6:,.0f} MB and {free / 1e6:,.0f} are free. Choose another --cache-dir, or fewer "
            "views."
        )


def _unwritable(path: Path, error: OSError) -> RunError:
    return RunError(f"{path}: cannot be written ({error.strerror or error}). Choose another --cache-dir.")


def _named(
    folder: Path, facts: dict[str, Any], shape: tuple[int, int], dtype: torch.dtype
) -> tuple[Path, dict[str, Any]]:
    """The file for these facts, and all of them."""
    facts = facts | {"rows": shape[0]}
    name = hashlib.sha256(_header(facts, shape[1], dtype, False).rstrip()).hexdigest()[:12]
    return folder / f"{facts['resize']}-{name}.vectors", facts


def _is_whole(path: Path, facts: dict[str, Any], shape: tuple[int, int], dtype: torch.dtype) -> bool:
    header = _header(facts, shape[1], dtype, False)
    with suppress(FileNotFoundError, NotADirectoryError), path.open("rb") as file:
        return os.fstat(file.fileno()).st_size == cached_bytes(shape, dtype) and file.read(len(header)) == header
    return False


def _mapped(path: Path, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    file = np.memmap(path, np.uint8, "c")  # private, page by page, when touched
    return torch.from_numpy(file)[HEADER_BYTES:].view(dtype).view(shape)
