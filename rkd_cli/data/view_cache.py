"""Cache of a network's embeddings of images or views, in a memory-mapped file in the cache folder."""

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
from rkd_cli.runtime.files import check_folder, locked, move_into_place

# ``cached_vectors``
CacheVectors = Callable[
    [Path, dict[str, Any], tuple[int, int], torch.dtype, Callable[[int], Iterator[Tensor]], Reporter, str], Tensor
]


def cached_vectors(
    folder: Path,
    facts: dict[str, Any],
    shape: tuple[int, int],
    dtype: torch.dtype,
    compute: Callable[[int], Iterator[Tensor]],
    report: Reporter,
    what: str,
) -> Tensor:
    """(R, D) cached vectors for ``facts``, computed if they are not cached yet.

    An interrupted computation resumes. Another process that needs the same file waits for it. ``facts`` (JSON) is
    everything that determines the vectors, and what ``rkd cache`` shows. ``compute(row)`` yields the vectors from
    ``row`` on, (B, D) at a time; ``what`` names the work in progress events.
    """
    path, header = _named(folder, facts, shape, dtype)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(path):
            found = read_cached(folder, facts, shape, dtype)
            if found is None:
                check_cached(folder, facts, shape, dtype)
                _fill(path, header, shape[0], shape[1] * dtype.itemsize, dtype, compute, report, what)
                found = _mapped(path, shape, dtype)
    except OSError as error:
        raise _unwritable(path, error) from None
    return found


def read_cached(folder: Path, facts: dict[str, Any], shape: tuple[int, int], dtype: torch.dtype) -> Tensor | None:
    """(R, D) cached vectors for ``facts``, or None if there is no complete file."""
    path, header = _named(folder, facts, shape, dtype)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size != cached_bytes(shape, dtype) or file.read(len(header)) != header:
                return None
    except (FileNotFoundError, NotADirectoryError):
        return None
    return _mapped(path, shape, dtype)


def cached_bytes(shape: tuple[int, int], dtype: torch.dtype) -> int:
    """The size of the file."""
    return HEADER_BYTES + shape[0] * shape[1] * dtype.itemsize


def check_cached(folder: Path, facts: dict[str, Any], shape: tuple[int, int], dtype: torch.dtype) -> Path:
    """The path of the cache file; raises a RunError if it cannot be written."""
    path, _ = _named(folder, facts, shape, dtype)
    try:
        check_folder(folder)
    except OSError as error:
        raise _unwritable(path, error) from None
    size, free = cached_bytes(shape, dtype), free_space(folder)
    if free < size:
        raise RunError(
            f"{path}: needs {size / 1e6:,.0f} MB, and {free / 1e6:,.0f} MB are free. Choose another --cache-dir, or "
            "fewer views."
        )
    return path


def _unwritable(path: Path, error: OSError) -> RunError:
    return RunError(f"{path}: cannot be written ({error.strerror or error}). Choose another --cache-dir.")


def _named(folder: Path, facts: dict[str, Any], shape: tuple[int, int], dtype: torch.dtype) -> tuple[Path, bytes]:
    """The file for these facts, and its header."""
    header = json.dumps(facts | {"rows": shape[0], "size": shape[1], "type": str(dtype)}).encode()
    name = hashlib.sha256(header).hexdigest()[:12]
    return folder / f"{facts['resize']}-{name}.vectors", header.ljust(HEADER_BYTES)


def _mapped(path: Path, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    file = np.memmap(path, np.uint8, "c")  # copy-on-write
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
    """Append rows to an unfinished file, whose length gives the number of rows done, then move it into place."""
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
            file.flush()  # so that a killed process loses no block
            done += len(block)
            report(Progress(what, done, rows, "views"))
    move_into_place(unfinished, path)
