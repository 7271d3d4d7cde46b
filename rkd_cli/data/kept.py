"""What a network makes of images, computed once: a memory-mapped file of vectors beside the decoded pixels."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rkd_cli.data.cache import HEADER_BYTES
from rkd_cli.errors import RunError
from rkd_cli.events import Progress, Reporter
from rkd_cli.runtime.files import land, locked


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
    header = json.dumps(facts | {"rows": shape[0], "size": shape[1], "type": str(dtype)}).encode()
    name = hashlib.sha256(header).hexdigest()[:12]
    path = folder / f"{facts['resize']}-{name}.vectors"
    header = header.ljust(HEADER_BYTES)
    bytes_a_row = shape[1] * dtype.itemsize
    whole = len(header) + shape[0] * bytes_a_row
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(path):
            if not _is_whole(path, header, whole):
                _check_room(folder, path, whole)
                _fill(path, header, shape[0], bytes_a_row, dtype, compute, report, what)
            file = np.memmap(path, np.uint8, "c")  # private, page by page, when touched
    except OSError as error:
        raise RunError(f"{path}: cannot be written ({error.strerror or error}): choose another --cache-dir") from None
    return torch.from_numpy(file)[len(header) :].view(dtype).view(shape)


def _is_whole(path: Path, header: bytes, whole: int) -> bool:
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_size == whole and file.read(len(header)) == header
    except FileNotFoundError:
        return False


def _check_room(folder: Path, path: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size:
        raise RunError(
            f"{path}: takes {size / 1e6:,.0f} MB and {free / 1e6:,.0f} are free: choose another --cache-dir, or fewer "
            "views"
        )


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
