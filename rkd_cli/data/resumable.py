"""An unfinished vectors file: embeddings in a hidden file, from which an interrupted command resumes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from rkd_cli.data.cache import HEADER_BYTES
from rkd_cli.errors import RunError

_CHUNK = 1 << 16  # rows whose stamps are compared at once


def rows_path(out: Path) -> Path:
    """The hidden file with the embeddings of ``out`` until it is complete."""
    return out.with_name(f".{out.name}.rows.part")


@dataclass
class ResumableFile:
    """The first ``done`` float32 embeddings, each with the stamp of its image. Implements ``compress.Rows``.

    Each slice is memory-mapped on its own, so that a pass over the file needs memory for one slice only.
    """

    path: Path
    size: int
    stamps: np.ndarray  # (N,) uint64, see ``cache.file_stamps``
    done: int
    changed: str  # what differs from an earlier unfinished file; empty without one, or if it can be resumed
    device: torch.device
    _file: BinaryIO

    @property
    def _row(self) -> np.dtype[Any]:
        return np.dtype([("stamp", np.uint64), ("embedding", np.float32, (self.size,))])

    def _mapped(self, start: int, stop: int) -> np.ndarray:
        at = HEADER_BYTES + start * self._row.itemsize
        return np.memmap(self.path, self._row, "c", at, (stop - start,))  # copy-on-write

    @property
    def shape(self) -> tuple[int, int]:
        """(done, D)."""
        return self.done, self.size

    def __getitem__(self, rows: slice) -> Tensor:
        start, stop, _ = rows.indices(self.done)
        return torch.from_numpy(self._mapped(start, stop)["embedding"]).to(self.device)

    def append(self, rows: Tensor) -> None:
        """Append (B, D) rows and flush them."""
        block = np.empty(len(rows), self._row)
        block["stamp"] = self.stamps[self.done : self.done + len(rows)]
        block["embedding"] = rows.to("cpu", torch.float32).numpy()
        self._file.write(block.data)
        self._file.flush()
        self.done += len(rows)

    def truncate(self, done: int) -> None:
        """Drop all but the first ``done`` rows."""
        self._file.truncate(HEADER_BYTES + done * self._row.itemsize)
        self.done = done

    def _truncate_changed(self) -> None:
        """Drop incomplete rows, and all rows from the first whose image differs."""
        stored = (self._file.seek(0, os.SEEK_END) - HEADER_BYTES) // self._row.itemsize
        valid = min(stored, len(self.stamps))
        for start in range(0, valid, _CHUNK):
            stop = min(start + _CHUNK, valid)
            other = np.flatnonzero(self._mapped(start, stop)["stamp"] != self.stamps[start:stop])
            if len(other):
                valid = start + int(other[0])
                break
        if stored and not valid:
            self.changed = self.changed or "other images"
        self.truncate(valid)


@contextmanager
def open_resumable(
    out: Path, facts: dict[str, Any], stamps: np.ndarray, size: int, device: torch.device
) -> Iterator[ResumableFile]:
    """The unfinished file of ``out``: an earlier one for the same ``facts``, up to the first changed image, or a new
    one.

    ``facts`` (JSON) is everything besides the images that determines the embeddings, under readable names. Raises a
    RunError if another process has locked the file.
    """
    path = rows_path(out)
    header = json.dumps(facts).encode().ljust(HEADER_BYTES)
    with path.open("a+b") as file:
        _lock(file, out)
        file.seek(0)
        before = file.read(HEADER_BYTES)
        changed = _changed(before, facts)
        if before != header:
            file.truncate(0)
            file.write(header)
            file.flush()
        part = ResumableFile(path, size, stamps, 0, changed, device, file)
        part._truncate_changed()
        yield part


def _lock(file: BinaryIO, out: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RunError(f"--out {out}: another rkd embed is writing it. Wait for it, or name another file.") from None
    except OSError:  # some network folders have no locks
        return


def _changed(before: bytes, facts: dict[str, Any]) -> str:
    old: object = None
    with suppress(ValueError):
        old = json.loads(before)
    if not before:
        return ""
    if not isinstance(old, dict):
        return "damaged header"
    return " and ".join(name for name, value in facts.items() if old.get(name) != value)
