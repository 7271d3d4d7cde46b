"""A training epoch of one student by a live teacher, by its views that are kept, and by its vectors alone."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torchvision

from figures import run
from rkd_cli.bench.cases import images_of, place_of, sampler_of
from rkd_cli.bench.measure import Measurement, Meter, resident_peak
from rkd_cli.data import load_dataset
from rkd_cli.data.splits import relative_names
from rkd_cli.embedding.vectors import write_vectors
from rkd_cli.events import silent
from rkd_cli.settings import BenchSettings, DistillSettings
from rkd_cli.training.loop import Run
from rkd_cli.training.open import build_run
from rkd_cli.training.step import update_weights

_VIEWS = 4
_KINDS = ("live", "views", "vectors")


def measure_teachers(settings: BenchSettings, meter: Meter) -> Iterator[Measurement]:
    """Seconds of an epoch's steps, all three in turn, and what a process that trains takes of memory.

    Args:
        settings: of the benchmark; ``teacher_base`` is a network of torchvision's, its weights random.
        meter: is told of each epoch.
    """
    sampler_of(settings, images_of(settings)[0])  # what is wrong with it is said now, not after minutes
    dataset, data = place_of(settings)
    with TemporaryDirectory(prefix="rkd-bench-") as scratch:
        _write_teachers(settings, dataset, data, Path(scratch))
        runs = {kind: _build(settings, dataset, data, Path(scratch), kind) for kind in _KINDS}
        seconds: dict[str, list[float]] = {kind: [] for kind in _KINDS}
        for number in range(1, meter.repeats + 1):
            for kind, built in runs.items():
                meter.tell(f"an epoch by {kind}, {number} of {meter.repeats}")
                seconds[kind] += meter.times(partial(_epoch, built), 0)
        del runs
        meter.tell("the memory of each")
        peaks = {kind: _memory(settings, dataset, data, Path(scratch), kind) for kind in _KINDS}
    live = statistics.median(seconds["live"])
    for kind, what in (("views", f"{_VIEWS} kept views of it"), ("vectors", "vectors alone")):
        yield Measurement(
            f"epoch of {settings.base}: {what} beside a live {settings.teacher_base}",
            statistics.median(seconds[kind]),
            live,
            peaks[kind],
            peaks["live"],
        )


def _write_teachers(settings: BenchSettings, dataset: str, data: Path, scratch: Path) -> None:
    """The teacher's weights, and some vectors, whose time is that of any."""
    network = torchvision.models.get_model(settings.teacher_base, weights=None)
    torch.save(network.state_dict(), scratch / "teacher.pth")
    names = [name for images in load_dataset(dataset, data) for name in relative_names(images.paths, data)]
    write_vectors(scratch / "vectors.npz", np.random.default_rng(0).normal(size=(len(names), 512)), names)


def _build(settings: BenchSettings, dataset: str, data: Path, scratch: Path, kind: str) -> Run:
    chosen = settings.model_dump(include=set(DistillSettings.model_fields) - {"dataset", "data", "save_dir", "teacher"})
    places = {"cache": "disk", "cache_dir": scratch / "cache", "overwrite": True, "weights": "none", "epochs": 1}
    teacher: dict[str, Any] = {"teacher": str(scratch / "vectors.npz")}
    if kind != "vectors":
        teacher = {
            "teacher": f"torchvision:{settings.teacher_base}",
            "teacher_weights": scratch / "teacher.pth",
            "teacher_views": _VIEWS if kind == "views" else 0,
        }
    place: dict[str, Any] = {"dataset": dataset, "data": data, "save_dir": scratch / kind}
    return build_run(DistillSettings(**chosen | places | teacher | place), silent)


def _epoch(run: Run) -> None:
    run.begin_training()
    for batch in run.loader.epoch(1):
        update_weights(run.optimizer, run.step(batch, 1))


def _memory(settings: BenchSettings, dataset: str, data: Path, scratch: Path, kind: str) -> int | None:
    """In a process of its own, with views that are there already."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(_memory_here, settings, dataset, data, scratch, kind).result()


def _memory_here(settings: BenchSettings, dataset: str, data: Path, scratch: Path, kind: str) -> int | None:
    return resident_peak(lambda: _epoch(_build(settings, dataset, data, scratch, kind)))


if __name__ == "__main__":
    _FLAGS = "dataset data teacher_base base batch num_image_per_class iter_per_epoch resize image_size repeats"
    run(measure_teachers, __doc__, *_FLAGS.split(), "precision")
