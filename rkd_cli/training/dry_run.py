"""What a training would take: its own steps on a few images for some seconds, extrapolated; nothing is written."""

from __future__ import annotations

import itertools
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
from rkd_cli.data.decode import AS_VIEWED, Decoding, load_resized
from rkd_cli.data.loader import Batch, DeviceReader, EvalLoader
from rkd_cli.data.workers import in_workers
from rkd_cli.embedding.batches import embed_batch
from rkd_cli.embedding.store import cached_bytes, check_cached, read_cached
from rkd_cli.errors import DataError
from rkd_cli.events import Progress, Reporter, RunStarted
from rkd_cli.metrics import agreement, recall_at_k
from rkd_cli.models import EmbeddingNet
from rkd_cli.runtime.context import processes_here
from rkd_cli.runtime.distributed import ALONE
from rkd_cli.runtime.doctor import main_memory, memory_limit, peak_memory
from rkd_cli.schemas import Position
from rkd_cli.training.loop import Run, learned
from rkd_cli.training.run_directory import RunDirectory
from rkd_cli.training.teachers import LiveTeacher

_SECONDS = 5.0  # that each kind of work is tried for, two pieces of it at least
_IMAGES = 256  # decoded, at most
_AT_ONCE = 8  # images that a worker decodes
_NEIGHBORS = 4096  # images that recall is tried on


@dataclass(frozen=True)
class Once:
    """Work that comes once, before the first step; ``bytes`` of what it makes go into a folder."""

    count: int
    unit: str
    seconds: float
    bytes: int = 0
    folder: Path | None = None
    free: int = 0  # bytes of its disk


@dataclass(frozen=True)
class DryRun:
    """What a training would be, and take; seconds and memory are measured, and extrapolated."""

    started: RunStarted
    weights: str  # that the network starts from
    image_size: int  # that batches have
    resized_to: dict[str, int]  # {network: the only side that it takes}, where batches have another
    batch: int
    once: dict[str, Once]  # {work: what it takes, of all runs together}
    step_seconds: tuple[float, ...]  # of each of the objectives that are left
    evaluation_seconds: float  # of all splits that are measured
    teacher_seconds: float  # of the same for the teacher, once
    seconds: tuple[float, ...]  # that are left of each run, evaluations included
    memory: int | None  # bytes at the peak, of the GPU where there is one
    memory_total: int | None
    run_bytes: int  # that a run's directory takes
    run_free: int  # bytes of its disk


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
        decoding: Decoding = AS_VIEWED,
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

        seconds = _pace(decode()) * len(paths)
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
        """In place of ``embedding.store.cached_rows``: noise, after some of the vectors were computed.

        Raises:
            RunError: the file could not be written, or vectors are not finite.
        """
        found = read_cached(folder, facts, shape, dtype)
        if found is not None:
            return found
        path = check_cached(folder, facts, shape, dtype)
        network = facts["vectors of"]
        if network not in self._paces:
            self._paces[network] = _pace(map(len, compute(0)))
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


def measure(run: Run, directories: Sequence[RunDirectory], samples: Samples, weights: str, report: Reporter) -> DryRun:
    """Try the evaluation, the teacher's and the steps of a run.

    Args:
        run: not begun; its weights are spoiled.
        directories: of the runs that are meant, this one's first.
        samples: what it was built with.
        weights: that its network starts from.
        report: is told how far it is.
    Raises:
        DataError: damaged images.
        RunError: memory that is full.
    """
    context, total = run.context, 2 + len(run.started.objectives)
    places = [directory.resumed or Position() for directory in directories]
    images = {name: len(loader.images) for name, loader in run.evaluation.items()}
    loader, size = run.evaluation["eval"].whole(), context.ranks.size
    run.embedder.eval()
    pace = _pace(_passes(loader, lambda batch: embed_batch(run.embedder, batch, context)), run) / size
    evaluation = sum(pace * count + _figures_seconds(run, count) for count in images.values())
    report(Progress("Measuring", 1, total, "parts"))
    teacher, of_teacher = run.teacher, 0.0
    if isinstance(teacher, LiveTeacher):
        pace = _pace(_passes(loader, lambda batch: teacher.view(context.to_device(batch.images), batch, False)), run)
        pace /= size
        names = images.keys() - ({"val"} if run.has_labels else ())
        of_teacher = sum(pace * images[name] for name in names)
    report(Progress("Measuring", 2, total, "parts"))
    steps = []
    for done, (first, _) in enumerate(_stages(run), 3):
        steps.append(_pace(_steps(run, first), run))
        report(Progress("Measuring", done, total, "parts"))
    report(Progress("Measuring", total, total, "parts"))
    memory, memory_total = _memory(run, samples)
    return DryRun(
        started=run.started,
        weights=weights,
        image_size=run.header.image_size,
        resized_to=_resized_to(run),
        batch=run.loader.batch,
        once=samples.once,
        step_seconds=tuple(steps),
        evaluation_seconds=evaluation,
        teacher_seconds=of_teacher,
        seconds=tuple(_left(run, at, steps, evaluation, of_teacher) for at in places),
        memory=memory,
        memory_total=memory_total,
        run_bytes=_run_bytes(run),
        run_free=free_space(run.directory.path),
    )


def _pace(counts: Iterable[int], run: Run | None = None) -> float:
    """Seconds a unit, of the later half of what is done in ``_SECONDS``: whatever warms up, or was ready, comes first.

    Args:
        counts: how many units each piece of work is that iterating does.
        run: whose device is waited for, and whose ranks end together.
    """
    ranks = run.context.ranks if run else ALONE
    marks = [(time.perf_counter(), 0)]
    for count in counts:
        if run and run.context.device.type == "cuda":
            torch.cuda.synchronize(run.context.device)
        marks.append((time.perf_counter(), marks[-1][1] + count))
        if len(marks) > 2 and ranks.any(marks[-1][0] - marks[0][0] >= _SECONDS):
            break
    (start, before), (end, done) = marks[(len(marks) - 1) // 2], marks[-1]
    return (end - start) / (done - before)


def _passes(loader: EvalLoader, embed: Callable[[Batch], object]) -> Iterator[int]:
    for batch in itertools.chain.from_iterable(itertools.repeat(loader)):
        embed(batch)
        yield len(batch.images)


def _steps(run: Run, epoch: int) -> Iterator[int]:
    run.begin_training()
    while True:
        for step, batch in enumerate(run.loader.epoch(epoch), 1):
            learned(run, batch, epoch, step)
            yield 1


def _figures_seconds(run: Run, count: int) -> float:
    """Of the figures of so many embeddings, each of which is compared with all others."""
    tried = min(count, _NEIGHBORS)
    vectors = torch.randn(tried, run.model.embedding_size, device=run.context.device)
    labels = torch.arange(tried, device=run.context.device) // 2

    def figures() -> Iterator[int]:
        for _ in range(2):
            _ = recall_at_k(vectors, labels, run.ks) if run.has_labels else agreement(vectors, vectors)
            yield 1

    shared = run.context.ranks.size if run.has_labels else 1
    return _pace(figures(), run) * (count / tried) ** 2 / shared


def _stages(run: Run) -> list[tuple[int, int]]:
    """The first and the last epoch of each objective that an epoch has."""
    stages, first = [], 1
    for objective in run.started.objectives:
        last = min(run.epochs, objective.epochs or run.epochs)
        if first <= last:
            stages.append((first, last))
        first = last + 1
    return stages


def _left(run: Run, at: Position, steps: Sequence[float], evaluation: float, teacher: float) -> float:
    """Seconds that are left of a run that stands there."""
    first = max(1, at.epoch)
    epochs = [max(0, last - max(start, first) + 1) for start, last in _stages(run)]
    training = sum(count * len(run.loader) * step for count, step in zip(epochs, steps, strict=True))
    for (start, last), step in zip(_stages(run), steps, strict=True):
        training -= at.step * step if start <= at.epoch <= last else 0.0
    measured = max(0, run.epochs // run.eval_every - (first - 1) // run.eval_every)
    measured += bool(first <= run.epochs and run.epochs % run.eval_every) + (at.epoch == 0)
    asks = not at.teacher_eval_recall if run.has_labels else first <= run.epochs
    return training + measured * evaluation + asks * teacher


def _resized_to(run: Run) -> dict[str, int]:
    sides = {"student" if run.teacher else "network": run.model.normalization.input_size}
    if isinstance(run.teacher, LiveTeacher) and isinstance(run.teacher.network, EmbeddingNet):
        sides["teacher"] = run.teacher.network.normalization.input_size
    return {name: side for name, side in sides.items() if side and side != run.header.image_size}


def _memory(run: Run, samples: Samples) -> tuple[int | None, int | None]:
    """Bytes at the peak, and of all there are."""
    device = run.context.device
    if device.type == "cuda":
        kept = samples.pixels_left_out if run.loader.what == DeviceReader.what else 0
        return torch.cuda.max_memory_allocated(device) + kept, torch.cuda.mem_get_info(device)[1]
    limits = [limit for limit in (main_memory().total, memory_limit()) if limit]
    peak = peak_memory()
    return peak and peak * processes_here(), min(limits, default=None)


def _run_bytes(run: Run) -> int:
    """Best and last model; and the state, of weights with two averages of each that learns, twice while it is saved."""
    model: int = sum(tensor.nbytes for tensor in run.model.state_dict().values())
    learner: int = sum(tensor.nbytes for tensor in run.learner.state_dict().values())
    averages: int = sum(2 * p.nbytes for group in run.optimizer.param_groups for p in group["params"])
    return 2 * model + 2 * (learner + averages)
