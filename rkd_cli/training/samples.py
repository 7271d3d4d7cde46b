"""Caches of a dry run: a few images in memory in place of files of all images."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rkd_cli.data.cache import PixelCache, cache_bytes, cache_path, check_cache, free_space
from rkd_cli.data.decode import AS_DISPLAYED, Decoding, load_resized
from rkd_cli.data.workers import in_workers
from rkd_cli.embedding.store import cached_bytes, check_cached, read_cached
from rkd_cli.errors import DataError
from rkd_cli.events import Reporter
from rkd_cli.runtime.context import Context
from rkd_cli.runtime.distributed import ALONE

_SECONDS = 5.0  # to time each kind of work for, at least two pieces of it
_IMAGES = 256  # decoded, at most
_AT_ONCE = 8  # images that a worker decodes


@dataclass(frozen=True)
class Once:
    """Work done once, before the first step; it writes ``bytes`` into ``folder``."""

    count: int
    unit: str
    seconds: float
    bytes: int = 0
    folder: Path | None = None
    free: int = 0  # bytes on its disk


def pace(counts: Iterable[int], context: Context | None = None) -> float:
    """Seconds per unit of the later half of the work done in ``_SECONDS``; the first half is warm-up.

    Iterating over ``counts`` does the work; each item is the number of units done.
    """
    ranks = context.ranks if context else ALONE
    marks = [(time.perf_counter(), 0)]
    for count in counts:
        if context and context.device.type == "cuda":
            torch.cuda.synchronize(context.device)
        marks.append((time.perf_counter(), marks[-1][1] + count))
        if len(marks) > 2 and ranks.any(marks[-1][0] - marks[0][0] >= _SECONDS):
            break
    (start, before), (end, done) = marks[(len(marks) - 1) // 2], marks[-1]
    return (end - start) / (done - before)


class Samples:
    """Caches made of a few images, in memory. Existing cache files are read."""

    def __init__(self) -> None:
        self.once: dict[str, Once] = {}
        self.pixels_left_out = 0  # bytes
        self._pixels: dict[Path, PixelCache] = {}
        self._vectors: set[Path] = set()
        self._paces: dict[str, float] = {}

    def add(self, what: str, work: Once) -> None:
        """Add work, to the same work of other runs if any."""
        known = self.once.get(what, Once(0, work.unit, 0.0))
        self.once[what] = replace(
            work,
            count=known.count + work.count,
            seconds=known.seconds + work.seconds,
            bytes=known.bytes + work.bytes,
        )

    def make_cache(
        self,
        folder: Path,
        paths: Sequence[Path],
        resize: int,
        workers: int,
        report: Reporter,
        decoding: Decoding = AS_DISPLAYED,
    ) -> PixelCache:
        """Replaces ``data.cache.make_cache``: decodes a few images and repeats them."""
        path, size = cache_path(folder, paths, resize, decoding), cache_bytes(len(paths), resize)
        if path in self._pixels:
            return self._pixels[path]
        check_cache(folder, paths, resize, decoding)
        chosen = random.Random(0).sample(paths, min(_IMAGES, len(paths)))
        chunks = [chosen[start : start + _AT_ONCE] for start in range(0, len(chosen), _AT_ONCE)]
        decoded: list[np.ndarray] = []

        def decode() -> Iterator[int]:
            for pixels in in_workers(partial(_decoded, resize, decoding), chunks, workers):
                if isinstance(pixels, DataError):
                    raise pixels
                decoded.append(pixels)
                yield len(pixels)

        seconds = pace(decode()) * len(paths)
        pixels = torch.from_numpy(np.concatenate(decoded))
        self.pixels_left_out = size - pixels.nbytes
        self.add("decoding", Once(len(paths), "images", seconds, size, folder, free_space(folder)))
        rows = {image: number % len(pixels) for number, image in enumerate(paths)}
        return self._pixels.setdefault(path, PixelCache(pixels, rows, path))

    def cached_rows(
        self,
        folder: Path,
        facts: dict[str, Any],
        shape: tuple[int, int],
        dtype: torch.dtype,
        compute: Callable[[int], Iterator[Tensor]],
        report: Reporter,
        what: str,
    ) -> Tensor:
        """Replaces ``embedding.store.cached_rows``: computes a few embeddings and returns noise."""
        found = read_cached(folder, facts, shape, dtype)
        if found is not None:
            return found
        path = check_cached(folder, facts, shape, dtype)
        network = facts["vectors of"]
        if network not in self._paces:
            self._paces[network] = pace(map(len, compute(0)))
        if path not in self._vectors:
            self._vectors.add(path)
            seconds, size = self._paces[network] * shape[0], cached_bytes(shape, dtype)
            self.add(what.lower(), Once(shape[0], "crops", seconds, size, folder, free_space(folder)))
        return torch.randn(sum(shape), dtype=dtype).as_strided(shape, (1, 1))  # overlapping rows: little memory


def _decoded(resize: int, decoding: Decoding, paths: Sequence[Path]) -> np.ndarray | DataError:
    # return the error: a raised one would be wrapped in the worker's traceback
    try:
        return np.stack([load_resized(path, resize, decoding) for path in paths])
    except DataError as error:
        return error
