"""What a dry run makes of a few images, in memory, where a training makes files of all of them."""

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

_SECONDS = 5.0  # that each kind of work is tried for, two pieces of it at least
_IMAGES = 256  # decoded, at most
_AT_ONCE = 8  # images that a worker decodes


@dataclass(frozen=True)
class Once:
    """Work that comes once, before the first step; ``bytes`` of what it makes go into a folder."""

    count: int
    unit: str
    seconds: float
    bytes: int = 0
    folder: Path | None = None
    free: int = 0  # bytes of its disk


def pace(counts: Iterable[int], context: Context | None = None) -> float:
    """Seconds a unit, of the later half of what is done in ``_SECONDS``: whatever warms up, or was ready, comes first.

    Args:
        counts: how many units each piece of work is that iterating does.
        context: whose device is waited for, and whose ranks end together.
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
    """Makes of a few images, in memory, what runs keep in files of all of them; files that are there are read."""

    def __init__(self) -> None:
        self.once: dict[str, Once] = {}
        self.pixels_left_out = 0  # bytes
        self._pixels: dict[Path, PixelCache] = {}
        self._vectors: set[Path] = set()
        self._paces: dict[str, float] = {}

    def add(self, what: str, work: Once) -> None:
        """Some work more; with more of the same of another run it is one."""
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
        """In place of ``data.cache.make_cache``: each image is one of those that were decoded.

        Raises:
            DataError: one of them is damaged.
            RunError: the file could not be written.
        """
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

    def keep_vectors(
        self,
        folder: Path,
        facts: dict[str, Any],
        shape: tuple[int, int],
        dtype: torch.dtype,
        compute: Callable[[int], Iterator[Tensor]],
        report: Reporter,
        what: str,
    ) -> Tensor:
        """In place of ``data.kept.cached_rows``: noise, after some of the vectors were computed.

        Raises:
            RunError: the file could not be written, or vectors are not finite.
        """
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
        return torch.randn(sum(shape), dtype=dtype).as_strided(shape, (1, 1))  # rows that differ, in next to no memory


def _decoded(resize: int, decoding: Decoding, paths: Sequence[Path]) -> np.ndarray | DataError:
    # an error crosses the process border as a value: raised, it would arrive wrapped in a worker's traceback
    try:
        return np.stack([load_resized(path, resize, decoding) for path in paths])
    except DataError as error:
        return error
