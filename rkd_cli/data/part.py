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

_ITEM = 4  # bytes of a float32


def part_of(out: Path) -> Path:
    """Where the rows of ``out`` are until all are there."""
    return out.with_name(f".{out.name}.rows.part")


@dataclass
class PartFile:
    """The first ``done`` float32 rows of D; the others are to be appended.

    ``shape`` and rows by slices, as ``compress.Rows`` has them: each slice maps its own pages and lets go of them, so
    that the memory of a pass over millions is that of one.
    """

    path: Path
    size: int
    done: int
    changed: str  # what is no longer as it was when another file was begun here; empty where none was, or all is
    device: torch.device
    _file: BinaryIO

    @property
    def shape(self) -> tuple[int, int]:
        """Rows that are there, and D."""
        return self.done, self.size

    def __getitem__(self, rows: slice) -> Tensor:
        start, stop, _ = rows.indices(self.done)
        at = HEADER_BYTES + start * self.size * _ITEM
        mapped = np.memmap(self.path, np.float32, "c", at, (stop - start, self.size))  # private: nothing writes it
        return torch.from_numpy(mapped).to(self.device)

    def append(self, rows: Tensor) -> None:
        """Put (B, D) rows behind the others; a process that is killed then loses none of them.

        Raises:
            OSError: the disk is full.
        """
        self._file.write(rows.to("cpu", torch.float32).contiguous().numpy().data)
        self._file.flush()
        self.done += len(rows)

    def cut(self, done: int) -> None:
        """Leave the first rows alone."""
        self._file.truncate(HEADER_BYTES + done * self.size * _ITEM)
        self.done = done


@contextmanager
def open_part(out: Path, facts: dict[str, Any], size: int, device: torch.device) -> Iterator[PartFile]:
    """The part file of ``out``: the one that was begun for these facts, or else a new one. Others wait for nobody.

    Args:
        out: what is going to be written.
        facts: all that the rows are a function of, by names that a person understands; JSON.
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
        done = (file.seek(0, os.SEEK_END) - HEADER_BYTES) // (size * _ITEM)
        part = PartFile(path, size, done, changed, device, file)
        part.cut(done)  # of a row that was not written to its end
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
