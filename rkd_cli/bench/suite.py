"""The parts of ``rkd bench``: time and memory of rkd and of the textbook code."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from rkd_cli import __version__
from rkd_cli.bench import textbook
from rkd_cli.bench.cases import KS, SIDE, cases, images_of, sampler_of
from rkd_cli.bench.measure import Measurement, Meter, free_memory, one_thread
from rkd_cli.bench.reference import apart, one_batch
from rkd_cli.data.cache import make_cache
from rkd_cli.data.decode import random_crops
from rkd_cli.data.loader import FileReader
from rkd_cli.data.sets.demo import make_demo
from rkd_cli.events import Event, Progress, Reporter, silent
from rkd_cli.losses import RKDAngle, RKDDistance, TripletLoss
from rkd_cli.metrics import recall_at_k
from rkd_cli.mining import AllPairs, DistanceWeighted, SemiHardNegative
from rkd_cli.runtime.context import device_name, make_context
from rkd_cli.runtime.doctor import processor_name
from rkd_cli.schemas import EpochDone
from rkd_cli.settings import BenchSettings, DistillSettings, TeacherSettings
from rkd_cli.training.loop import train
from rkd_cli.training.open import build_run

_TEXTBOOK_UP_TO = 512  # rows on a CPU, where the angle loss takes seconds
_STUDENT, _TEACHER = 128, 512  # dimensions
_STEPS = 2.0  # seconds of steps to time

Rows = Iterator[Measurement]


def run_bench(settings: BenchSettings, parts: Sequence[str], report: Reporter) -> list[Measurement]:
    """Measure parts of ``PARTS`` in order.

    Raises:
        RkdError: the images are missing or do not fill a batch.
    """
    device = make_context(settings.device, "fp32").device
    if {"step", "epoch"} & set(parts):
        sampler_of(settings, images_of(settings)[0])  # raises errors now, not after minutes
    rows: list[Measurement] = []
    for number, part in enumerate(parts):

        def tell(what: str, number: int = number) -> None:
            report(Progress(f"Measuring {what}", number, len(parts), "parts"))

        torch.manual_seed(settings.seed)
        rows += PARTS[part](settings, Meter(device, settings.repeats, tell))
    return rows


def machine(settings: BenchSettings) -> dict[str, object]:
    """The versions and the hardware of the measurements."""
    device = make_context(settings.device, "fp32").device
    return {
        "rkd": __version__,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "python": platform.python_version(),
        "device": device_name(device),
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _relations(name: str, loss: nn.Module, formula: Any, settings: BenchSettings, meter: Meter) -> Rows:
    for n in (16, 32) if settings.quick else (64, 128, 256, 512, 2048):
        yield relation(f"{name}, N={n}", loss, formula, n, meter)


def relation(work: str, ours: nn.Module, formula: Any, n: int, meter: Meter) -> Measurement:
    """Forward and backward pass of a loss, and of the textbook's if it fits into memory."""
    loss = relation_of(ours, n, meter.device)
    huge = formula is textbook.angle_loss and not _textbook_fits(n, meter.device)
    if huge and meter.device.type == "cuda":
        return meter.once(work, loss)
    return meter.compare(work, loss, None if huge else relation_of(formula, n, meter.device), resident=huge)


def relation_of(loss: Callable[[Tensor, Tensor], Tensor], n: int, device: torch.device) -> Callable[[], None]:
    """Forward and backward pass with N random embeddings."""
    student = torch.randn(n, _STUDENT, device=device, requires_grad=True)
    teacher = F.normalize(torch.randn(n, _TEACHER, device=device), dim=1)
    return lambda: _gradient(loss(student, teacher))


def _textbook_fits(n: int, device: torch.device) -> bool:
    """Whether its angle loss fits: three (N, N, N) tensors, and some (N, N, D) for the gradient."""
    if device.type == "cpu":
        return n <= _TEXTBOOK_UP_TO
    floats = 3 * n**3 + n**2 * (2 * _TEACHER + 6 * _STUDENT)  # 3,490 MB at N = 512; 3,492 were measured
    return free_memory(device) > 1.3 * 4 * floats


def _gradient(loss: Tensor) -> None:
    loss.backward()  # type: ignore[no-untyped-call]


def measure_miners(settings: BenchSettings, meter: Meter) -> Rows:
    n = 20 if settings.quick else 128
    x = F.normalize(torch.randn(n, _TEACHER, device=meter.device), dim=1)
    labels = torch.arange(n, device=meter.device) // 5
    semihard, everything, weighted = SemiHardNegative(), AllPairs(), DistanceWeighted()
    yield meter.compare(
        f"semi-hard mining, N={n}", lambda: semihard(x, labels), lambda: textbook.semihard_triplets(x, labels)
    )
    yield meter.compare(f"all triplets, N={n}", lambda: everything(x, labels), lambda: textbook.all_triplets(x, labels))
    x.requires_grad_()
    loss = TripletLoss(2, 0.2, weighted)
    yield meter.compare(
        f"distance-weighted triplet loss, N={n}",
        lambda: _gradient(loss(x, labels)),
        lambda: _gradient(textbook.triplet_loss(x, weighted(x, labels), 0.2)),
    )
    triplet = TripletLoss(2, 0.2, everything)
    yield meter.compare(
        f"triplet loss of all triplets, N={n}",
        lambda: _gradient(triplet(x, labels)),
        lambda: _gradient(textbook.triplet_loss(x, textbook.all_triplets(x, labels), 0.2)),
    )


def measure_recall(settings: BenchSettings, meter: Meter) -> Rows:
    n = 500 if settings.quick else 20_000
    device = meter.device
    labels = torch.arange(n, device=device) // 20
    x = F.normalize(torch.randn(n, 512, device=device) + torch.randn(n // 20, 512, device=device)[labels] / 8, dim=1)
    fits = free_memory(device) > 5 * 4 * n * n
    yield meter.compare(
        f"Recall@1,2,4,8 of {n:,} x 512",
        lambda: recall_at_k(x, labels, KS),
        (lambda: textbook.recall(x, labels, KS)) if fits else None,
    )


def _loader(settings: BenchSettings, meter: Meter) -> Rows:
    """On one core, because both use as many processes as there are cores."""
    images, indices, resize, side = one_batch(settings)
    batch = len(indices)
    crops = random_crops(indices, resize, side, torch.Generator().manual_seed(settings.seed))
    picked = sorted({images.paths[index] for index in indices})
    with one_thread(), TemporaryDirectory(prefix="rkd-bench-") as scratch, apart(settings, "loader") as textbooks:
        folder = Path(scratch)

        def cold() -> None:
            for old in folder.glob("*.pixels"):
                old.unlink()
            make_cache(folder, picked, resize, 0, silent)

        meter.tell("image loader: decoding every image once")
        reader = FileReader(make_cache(folder / "all", images.paths, resize, 0, silent), side)
        warm = meter.compare(
            f"image loader, warm, {resize} to {side}, batch of {batch}, one core",
            lambda: list(reader.read(images, [crops])),
            textbooks,
            memory=False,
        )
        yield replace(warm, note=f"{batch / warm.seconds:,.0f} images/s")
        what = f"image loader, cold: {len(picked)} images decoded into the file, one core"
        first = meter.compare(what, cold, None, memory=False)
        yield replace(first, note=f"{len(picked) / first.seconds:,.0f} images/s")


def _step(settings: BenchSettings, meter: Meter) -> Rows:
    with TemporaryDirectory(prefix="rkd-bench-") as scratch:
        for case in cases(settings, Path(scratch)):
            with apart(settings, "step", case.name) as textbooks:
                row = meter.compare(f"one {case.name} step, batch of {settings.batch}", case.step, textbooks)
            yield replace(row, note=f"{settings.batch / row.seconds:,.0f} images/s")


def _epoch(settings: BenchSettings, meter: Meter) -> Rows:
    """Training and the evaluation of both splits, with a warm cache."""
    sizes = f"{settings.iter_per_epoch} batches of {settings.batch}, both splits evaluated"
    with TemporaryDirectory(prefix="rkd-bench-") as scratch:
        for case in cases(settings, Path(scratch)):
            work, ours, theirs, speeds = f"one {case.name} epoch", list[float](), list[float](), list[float]()
            meter.tell(f"{work}: {sizes}; ours, to warm up")
            train(case.run, silent)
            with apart(settings, "epoch", case.name) as textbooks:
                meter.tell(f"{work}: the textbook's memory")
                textbook_bytes = textbooks.peak()  # also warms up
                for number in range(1, meter.repeats + 1):
                    meter.tell(f"{work}: ours, {number} of {meter.repeats}")
                    done = case.epoch()
                    ours.append(done.seconds)
                    speeds.append(done.images_per_second)
                    meter.tell(f"{work}: the textbook's, {number} of {meter.repeats}")
                    theirs += textbooks.times(0)
            meter.tell(f"{work}: our memory")
            with apart(settings, "epoch", case.name, ours=True) as own_process:
                bytes = own_process.peak()
            step = statistics.median(meter.times(case.step, _STEPS))
            fraction = statistics.median(speeds) * step / settings.batch
            yield Measurement(
                f"{work}: {sizes}",
                statistics.median(ours),
                statistics.median(theirs),
                bytes,
                textbook_bytes,
                f"training runs at {fraction:.2f} of the speed of a fixed batch",
            )


def _recipe(settings: BenchSettings, meter: Meter) -> Rows:
    """The paper's experiment on CUB, extrapolated from two epochs of each training."""
    species, images, epochs = (8, 6, 1) if settings.quick else (200, 59, 2)
    data = settings.data / "bench-cub"
    meter.tell(f"the CUB recipe: drawing and decoding {species * images:,} images")
    make_demo(data, species=species, images=images, size=60 if settings.quick else SIDE)
    seconds: dict[str, float] = {}
    with TemporaryDirectory(prefix="rkd-bench-") as scratch:
        small = {"batch": 8, "num_image_per_class": 2, "iter_per_epoch": 2, "resize": 40, "image_size": 32}
        common: dict[str, Any] = {"dataset": "cub200", "data": data, "weights": "none", "epochs": epochs}
        common |= {"device": settings.device, "precision": settings.precision, "compile": settings.compile}
        common |= {"cache_dir": Path(scratch, "cache")} | (small if settings.quick else {})
        start = time.perf_counter()
        teacher = TeacherSettings(**common, save_dir=Path(scratch, "teacher"))
        run = build_run(teacher, silent)
        decoding = time.perf_counter() - start
        checkpoint = teacher.save_dir / "best.safetensors"
        for name, count in (("teacher", 40), ("student", 80)):
            if name == "student":
                run = build_run(
                    DistillSettings(**common, teacher=str(checkpoint), save_dir=Path(scratch, "student")), silent
                )
            seen: list[Event] = []
            meter.tell(f"the CUB recipe: {name}, epochs to train: {epochs}")
            train(run, seen.append)
            done = [event for event in seen if isinstance(event, EpochDone) and event.epoch]
            seconds[name] = statistics.median(event.seconds for event in done)
            speed = statistics.median(event.images_per_second for event in done)
            yield Measurement(f"CUB recipe, one {name} epoch of {count}", seconds[name], note=f"{speed:,.0f} images/s")
    total = decoding + 40 * seconds["teacher"] + 80 * seconds["student"]
    yield Measurement(
        f"CUB recipe, all of it ({species * images:,} images, 40 + 80 epochs), scaled from {epochs} epochs of each",
        total,
        note=f"{decoding:.0f} s of it to decode every image once",
    )


PARTS: dict[str, Callable[[BenchSettings, Meter], Rows]] = {
    "angle": partial(_relations, "RKD-A", RKDAngle(), textbook.angle_loss),
    "distance": partial(_relations, "RKD-D", RKDDistance(), textbook.distance_loss),
    "miners": measure_miners,
    "recall": measure_recall,
    "loader": _loader,
    "step": _step,
    "epoch": _epoch,
    "recipe": _recipe,
}
