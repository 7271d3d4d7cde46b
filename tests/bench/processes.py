"""What a training takes in one process and in two that share its threads."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from figures import run
from rkd_cli.bench.cases import place_of
from rkd_cli.bench.measure import Measurement, Meter, resident_peak
from rkd_cli.commands.compare import read_rows
from rkd_cli.errors import RunError
from rkd_cli.settings import BenchSettings

_FLAGS = ("base", "batch", "num_image_per_class", "iter_per_epoch", "resize", "image_size", "lr", "device", "precision")


def measure_processes(settings: BenchSettings, meter: Meter) -> Iterator[Measurement]:
    """Seconds of a step of ``rkd train-teacher``, and the main memory of all its processes at the peak.

    Args:
        settings: of the benchmark: images, ``base``, sizes, batch.
        meter: is told of each training.
    Raises:
        RunError: a training failed.
    """
    dataset, data = place_of(settings)
    flags = [f"--{name.replace('_', '-')}={getattr(settings, name)}" for name in _FLAGS]
    flags += [f"--dataset={dataset}", f"--data={data}", "--weights=none", "--epochs=2", "--workers=0", "--quiet"]
    for processes in (1, 2):
        threads = max(1, torch.get_num_threads() // processes)
        meter.tell(f"a training in {processes} of 2 processes")
        with TemporaryDirectory(prefix="rkd-bench-") as scratch:
            places = [f"--cache-dir={scratch}", f"--save-dir={scratch}/run"]
            command = [sys.executable, "-m", "rkd_cli", "train-teacher", *flags, *places, f"--nproc={processes}"]
            peak = resident_peak(partial(_run, command, threads))
            speed = read_rows(Path(scratch, "run/metrics.jsonl"))[-1].images_per_second
        count = "1 process" if processes == 1 else f"{processes} processes"
        yield Measurement(
            f"training step, batch of {settings.batch}: {settings.base}, {settings.image_size} pixels, {count}",
            settings.batch / speed,
            bytes=peak,
            note=f"{speed:,.0f} images/s, threads of each: {threads}",
        )


def _run(command: list[str], threads: int) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False)
    if done.returncode:
        raise RunError(f"rkd {command[3]}: ended with {done.returncode} ({done.stderr.decode()[-200:].strip()})")


if __name__ == "__main__":
    run(measure_processes, __doc__, "dataset", "data", *_FLAGS[:-2], "precision")
