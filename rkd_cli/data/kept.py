"""What a network makes of images, computed once: a memory-mapped file of vectors beside the decoded pixels."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rkd_cli.data.cache import HEADER_BYTES, free_space
from rkd_cli.errors import RunError
from rkd_cli.events import Progress, Reporter
from rkd_cli.runtime.files import check_folder, land, locked

# ``kept_vectors``
KeepVectors = Callable[
    [Path, dict[str, Any], tuple[int, int], torch.dtype, Callable[[int], Iterator[Tensor]], Reporter, str], Tensor
]


def kept_vectors(
    folder: Path,
    facts: dict[str, Any],
    shape: tuple[int, int],
    dtype: torch.dtype,
    compute: Callable[[int], Iterator[Tensor]],
    report: Reporter,
    what: str,
) -> Tensor:
    """(R, D) vectors from the file that was made for these facts, or else computed into it.

    Stopped or killed, the work goes on where it stood; another process that wants the same file waits for it.

    Args:
        folder: of caches.
        facts: all that the vectors are a function of, and what ``rkd cache`` shows; JSON.
        shape: R and D.
        dtype: float16 or float32.
        compute: (first row) -> the rows from there on, (B, D) at a time.
        report: is told how far it is.
        what: the name of this work.
    Raises:
        RunError: the file cannot be written.
    """
    path, header = _named(folder, facts, shape, dtype)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(path):
            found = read_kept(folder, facts, shape, dtype)
            if found is None:
                check_kept(folder, facts, shape, dtype)
                _fill(path, header, shape[0], shape[1] * dtype.itemsize, dtype, compute, report, what)
                found = _mapped(path, shape, dtype)
    except OSError as error:
        raise _unwritable(path, error) from None
    return found


def read_kept(folder: Path, facts: dict[str, Any], shape: tuple[int, int], dtype: torch.dtype) -> Tensor | None:
    """(R, D) vectors from the file that was made for these facts, or None where there is none that is whole."""
    path, header = _named(folder, facts, shape, dtype)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size != kept_bytes(shape, dtype) or file.read(len(header)) != header:
                return None
    except (FileNotFoundError, NotADirectoryError):
        return None
    return _mapped(path, shape, dtype)


def kept_bytes(shape: tuple[int, int], dtype: torch.dtype) -> int:
    """What the file takes of the disk."""
    return HEADER_BYTES + shape[0] * shape[1] * dtype.itemsize


def check_kept(folder: Path, facts: dict[str, Any], shape: tuple[int, int], dtype: torch.dtype) -> Path:
    """The file that the vectors can be written into, without doing it.

    Raises:
        RunError: they cannot.
    """
    path, _ = _named(folder, facts, shape, dtype)
    try:
        check_folder(folder)
    except OSError as error:
        raise _unwritable(path, error) from None
    size, free = kept_bytes(shape, dtype), free_space(folder)
    if free < size:
        raise RunError(
            f"{path}: takes {size / 1e6:,.0f} MB and {free / 1e6:,.0f} are free: choose another --cache-dir, or fewer "
            "views"
        )
    return path


def _unwritable(path: Path, error: OSError) -> RunError:
    return RunError(f"{path}: cannot be written ({error.strerror or error}): choose another --cache-dir")


def _named(folder: Path, facts: dict[str, Any], shape: tuple[int, int], dtype: torch.dtype) -> tuple[Path, bytes]:
    """The file for these facts, and what it begins with."""
    header = json.dumps(facts | {"rows": shape[0], "size": shape[1], "type": str(dtype)}).encode()
    name = hashlib.sha256(header).hexdigest()[:12]
    return folder / f"{facts['resize']}-{name}.vectors", header.ljust(HEADER_BYTES)


def _mapped(path: Path, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    file = np.memmap(path, np.uint8, "c")  # private, page by page, when touched
    return torch.from_numpy(file)[HEADER_BYTES:].view(dtype).view(shape)


def _fill(
    path: Path,
    header: bytes,
    rows: int,
    bytes_a_row: int,
    dtype: torch.dtype,
    compute: Callable[[int], Iterator[Tensor]],
    report: Reporter,
    what: str,
) -> None:
    """Append rows to an unfinished file, whose length says how many it has, and put it in place."""
    unfinished = path.with_name(f".{path.name}.rows.part")
    with unfinished.open("a+b") as file:
        if file.seek(0, os.SEEK_END) < len(header):
            file.truncate(0)
            file.write(header)
        done = (file.tell() - len(header)) // bytes_a_row
        file.truncate(len(header) + done * bytes_a_row)
        for vectors in compute(done) if done < rows else ():
            block = vectors.to("cpu", dtype).contiguous()  # a sync
            file.write(block.view(torch.uint8).numpy().data)
            file.flush()  # a process that is killed loses no block; a machine that stops starts again
            done += len(block)
            report(Progress(what, done, rows, "views"))
    land(unfinished, path)
