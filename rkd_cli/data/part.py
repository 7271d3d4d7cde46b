"""Embeddings that are not all there yet: rows in a hidden file, which a killed command goes on with."""

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

_AT_ONCE = 1 << 16  # rows whose stamps are compared


def part_of(out: Path) -> Path:
    """Where the rows of ``out`` are until all are there."""
    return out.with_name(f".{out.name}.rows.part")


@dataclass
class PartFile:
    """The first ``done`` float32 rows of D, each with the stamp of its image; the others are to be appended.

    ``shape`` and rows by slices, as ``compress.Rows`` has them: each slice maps its own pages and lets go of them, so
    that the memory of a pass over millions is that of one.
    """

    path: Path
    size: int
    stamps: np.ndarray  # (N,) uint64: what tells an image from another, or from itself before it was changed
    done: int
    changed: str  # what is no longer as it was when another file was begun here; empty where none was, or all is
    device: torch.device
    _file: BinaryIO

    @property
    def _row(self) -> np.dtype[Any]:
        return np.dtype([("stamp", np.uint64), ("embedding", np.float32, (self.size,))])

    def _mapped(self, start: int, stop: int) -> np.ndarray:
        at = HEADER_BYTES + start * self._row.itemsize
        return np.memmap(self.path, self._row, "c", at, (stop - start,))  # private: nothing writes it

    @property
    def shape(self) -> tuple[int, int]:
        """Rows that are there, and D."""
        return self.done, self.size

    def __getitem__(self, rows: slice) -> Tensor:
        start, stop, _ = rows.indices(self.done)
        return torch.from_numpy(self._mapped(start, stop)["embedding"]).to(self.device)

    def append(self, rows: Tensor) -> None:
        """Put (B, D) rows behind the others; a process that is killed then loses none of them.

        Raises:
            OSError: the disk is full.
        """
        block = np.empty(len(rows), self._row)
        block["stamp"] = self.stamps[self.done : self.done + len(rows)]
        block["embedding"] = rows.to("cpu", torch.float32).numpy()
        self._file.write(block.data)
        self._file.flush()
        self.done += len(rows)

    def cut(self, done: int) -> None:
        """Leave the first rows alone."""
        self._file.truncate(HEADER_BYTES + done * self._row.itemsize)
        self.done = done

    def _keep_same(self) -> None:
        """Leave those rows alone that are whole and of these images, in this order."""
        there = (self._file.seek(0, os.SEEK_END) - HEADER_BYTES) // self._row.itemsize
        kept = min(there, len(self.stamps))
        for start in range(0, kept, _AT_ONCE):
            stop = min(start + _AT_ONCE, kept)
            other = np.flatnonzero(self._mapped(start, stop)["stamp"] != self.stamps[start:stop])
            if len(other):
                kept = start + int(other[0])
                break
        if there and not kept:
            self.changed = self.changed or "other images"
        self.cut(kept)


@contextmanager
def open_part(
    out: Path, facts: dict[str, Any], stamps: np.ndarray, size: int, device: torch.device
) -> Iterator[PartFile]:
    """The part file of ``out``: the one that was begun for these facts, or else a new one. Others wait for nobody.

    Of other images than before, it keeps the rows up to the first one that differs.

    Args:
        out: what is going to be written.
        facts: all that the rows are a function of beside their images, by names that a person understands; JSON.
        stamps: (N,) uint64, of the images.
        size: D.
        device: where slices go.
    Raises:
        RunError: another process writes it.
        OSError: it cannot be written.
    """
    path = part_of(out)
    header = json.dumps(facts).encode().ljust(HEADER_BYTES)
    with path.open("a+b") as file:
        _keep_alone(file, out)
        file.seek(0)
        before = file.read(HEADER_BYTES)
        changed = _changed(before, facts)
        if before != header:
            file.truncate(0)
            file.write(header)
            file.flush()
        part = PartFile(path, size, stamps, 0, changed, device, file)
        part._keep_same()
        yield part


def _keep_alone(file: BinaryIO, out: Path) -> None:
    try:
        import fcntl
    except ImportError:  # this system has no such locks
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RunError(f"--out {out}: another rkd embed is writing it: wait for that, or name another file") from None
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
    return " and ".join(name for name, value in facts.items() if old.get(name) != value)
