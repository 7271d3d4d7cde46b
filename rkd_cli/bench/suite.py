"""Our code beside the textbook formula, in one process: time, memory, and the ratio of the two."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import cycle, islice
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from rkd_cli import __version__
from rkd_cli.bench import textbook
from rkd_cli.bench.cases import KS, SIDE, cases, images_of, place_of, sampler_of
from rkd_cli.bench.chunk import measure_chunk
from rkd_cli.bench.embed import measure_embed
from rkd_cli.bench.measure import (
    Measurement,
    beside,
    free_memory,
    once,
    one_thread,
    resident_peak,
    seconds_of,
)
from rkd_cli.bench.ranks import measure_ranks
from rkd_cli.bench.search import measure_search
from rkd_cli.bench.teachers import measure_teachers
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

_TEXTBOOK_UP_TO = 512  # rows on a CPU, where its angle loss takes seconds
_STUDENT, _TEACHER = 128, 512  # dimensions


Rows = Iterator[Measurement]


def run_bench(settings: BenchSettings, parts: Sequence[str], report: Reporter) -> list[Measurement]:
    """The measurements of the parts, in their order.

    Raises:
        RkdError: images that cannot be had.
    """
    device = make_context(settings.device, "fp32").device
    if {"step", "epoch", "teachers"} & set(parts):
        sampler_of(settings, images_of(settings)[0])  # what is wrong with it is said now, not after minutes
    rows: list[Measurement] = []
    for number, part in enumerate(parts):
        report(Progress(f"Measuring: {part}", number, len(parts), "parts"))
        torch.manual_seed(settings.seed)
        rows += PARTS[part](settings, device)
    report(Progress("Measuring", len(parts), len(parts), "parts"))
    return rows


def machine(settings: BenchSettings) -> dict[str, object]:
    """What the figures hold for."""
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


def _angle(settings: BenchSettings, device: torch.device) -> Rows:
    for n in (16, 32) if settings.quick else (64, 128, 256, 512, 2048):
        yield relation(f"RKD-A, N={n}", RKDAngle(), textbook.angle_loss, n, device)


def _distance(settings: BenchSettings, device: torch.device) -> Rows:
    for n in (16, 32) if settings.quick else (64, 128, 256, 512, 2048):
        yield relation(f"RKD-D, N={n}", RKDDistance(), textbook.distance_loss, n, device)


def relation(work: str, ours: nn.Module, formula: Any, n: int, device: torch.device) -> Measurement:
    """Forward and backward of a loss; of the textbook's only where it fits."""
    loss = relation_of(ours, n, device)
    huge = formula is textbook.angle_loss and not _textbook_fits(n, device)
    if huge and device.type == "cuda":
        return once(work, loss, device)
    return beside(work, loss, None if huge else relation_of(formula, n, device), device, resident=huge)


def relation_of(loss: Callable[[Tensor, Tensor], Tensor], n: int, device: torch.device) -> Callable[[], None]:
    """Forward and backward of N random embeddings."""
    student = torch.randn(n, _STUDENT, device=device, requires_grad=True)
    teacher = F.normalize(torch.randn(n, _TEACHER, device=device), dim=1)
    return lambda: _gradient(loss(student, teacher))


def _textbook_fits(n: int, device: torch.device) -> bool:
    """Whether there is memory for its angle loss: three (N, N, N) and, by the student's gradient, some (N, N, D)."""
    if device.type == "cpu":
        return n <= _TEXTBOOK_UP_TO
    floats = 3 * n**3 + n**2 * (2 * _TEACHER + 6 * _STUDENT)  # 3,490 MB at N = 512; 3,492 were measured
    return free_memory(device) > 1.3 * 4 * floats


def _gradient(loss: Tensor) -> None:
    loss.backward()  # type: ignore[no-untyped-call]


def measure_miners(settings: BenchSettings, device: torch.device) -> Rows:
    n = 20 if settings.quick else 128
    x = F.normalize(torch.randn(n, _TEACHER, device=device), dim=1)
    labels = torch.arange(n, device=device) // 5
    semihard, everything, weighted = SemiHardNegative(), AllPairs(), DistanceWeighted()
    yield beside(
        f"semi-hard mining, N={n}", lambda: semihard(x, labels), lambda: textbook.semihard_triplets(x, labels), device
    )
    yield beside(
        f"all triplets, N={n}", lambda: everything(x, labels), lambda: textbook.all_triplets(x, labels), device
    )
    x.requires_grad_()
    loss = TripletLoss(2, 0.2, weighted)
    yield beside(
        f"distance-weighted triplet loss, N={n}",
        lambda: _gradient(loss(x, labels)),
        lambda: _gradient(textbook.triplet_loss(x, weighted(x, labels), 0.2)),
        device,
    )
    triplet = TripletLoss(2, 0.2, everything)
    yield beside(
        f"triplet loss of all triplets, N={n}",
        lambda: _gradient(triplet(x, labels)),
        lambda: _gradient(textbook.triplet_loss(x, textbook.all_triplets(x, labels), 0.2)),
        device,
    )


def measure_recall(settings: BenchSettings, device: torch.device) -> Rows:
    n = 500 if settings.quick else 20_000
    labels = torch.arange(n, device=device) // 20
    x = F.normalize(torch.randn(n, 512, device=device) + torch.randn(n // 20, 512, device=device)[labels] / 8, dim=1)
    fits = free_memory(device) > 5 * 4 * n * n
    yield beside(
        f"Recall@1,2,4,8 of {n:,} x 512",
        lambda: recall_at_k(x, labels, KS),
        (lambda: textbook.recall(x, labels, KS)) if fits else None,
        device,
    )


def _loader(settings: BenchSettings, device: torch.device) -> Rows:
    """On one core: both decode and crop in as many processes as there are."""
    resize, side, batch = (40, 32, 8) if settings.quick else (256, 224, 128)
    images = images_of(settings)[0]
    indices = list(islice(cycle(range(len(images))), batch))
    crops = random_crops(indices, resize, side, torch.Generator().manual_seed(settings.seed))
    theirs = textbook.Images(images.paths, images.labels or (), resize, side, train=True, as_bytes=True)
    picked = sorted({images.paths[index] for index in indices})
    with one_thread(), TemporaryDirectory(prefix="rkd-bench-") as scratch:
        folder = Path(scratch)

        def cold() -> None:
            for old in folder.glob("*.pixels"):
                old.unlink()
            make_cache(folder, picked, resize, 0, silent)

        def stacked() -> Tensor:
            return torch.stack([theirs[index][0] for index in indices])

        whole = make_cache(folder / "all", images.paths, resize, 0, silent)
        reader = FileReader(whole, side)
        warm = beside(
            f"image loader, warm, {resize} to {side}, batch of {batch}, one core",
            lambda: list(reader.read(images, [crops])),
            stacked,
            device,
            memory=False,
        )
        yield replace(warm, note=f"{batch / warm.seconds:,.0f} images/s")
        first = beside(
            f"image loader, cold: {len(picked)} images decoded into the file, one core",
            cold,
            None,
            device,
            memory=False,
        )
        yield replace(first, note=f"{len(picked) / first.seconds:,.0f} images/s")


def _step(settings: BenchSettings, device: torch.device) -> Rows:
    with TemporaryDirectory(prefix="rkd-bench-") as scratch:
        for case in cases(settings, Path(scratch), device):
            row = beside(f"one {case.name} step, batch of {settings.batch}", case.our_step, case.their_step, device)
            yield replace(row, note=f"{settings.batch / row.seconds:,.0f} images/s")


def _epoch(settings: BenchSettings, device: torch.device) -> Rows:
    """Training and the evaluation of both splits, with a warm cache."""
    with TemporaryDirectory(prefix="rkd-bench-") as scratch:
        for case in cases(settings, Path(scratch), device):
            train(case.run, silent)  # warms both the cache and the libraries
            ours, theirs, speeds = [], [], []
            for _ in range(settings.repeats):
                theirs.append(seconds_of(case.their_epoch, device))
                done = case.our_epoch()
                ours.append(done.seconds)
                speeds.append(done.images_per_second)
            step = statistics.median(seconds_of(case.our_step, device) for _ in range(7))
            share = statistics.median(speeds) * step / settings.batch
            yield Measurement(
                f"one {case.name} epoch: {settings.iter_per_epoch} batches of {settings.batch}, both splits evaluated",
                statistics.median(ours),
                statistics.median(theirs),
                _epoch_memory(settings, case.name, ours=True),
                _epoch_memory(settings, case.name, ours=False),
                f"training runs at {share:.2f} of the speed of a batch that stays",
            )


def _teachers(settings: BenchSettings, device: torch.device) -> Rows:
    return measure_teachers(settings, *place_of(settings), device)


def _embed(settings: BenchSettings, device: torch.device) -> Rows:
    yield measure_embed(settings, *place_of(settings), device)


def _ranks(settings: BenchSettings, device: torch.device) -> Rows:
    return measure_ranks(settings, *place_of(settings))


def _epoch_memory(settings: BenchSettings, name: str, ours: bool) -> int | None:
    """In a process of its own: in this one the heap has grown already."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(_epoch_memory_here, settings, name, ours).result()


def _epoch_memory_here(settings: BenchSettings, name: str, ours: bool) -> int | None:
    with TemporaryDirectory(prefix="rkd-bench-") as scratch:
        case = next(
            c for c in cases(settings, Path(scratch), make_context(settings.device, "fp32").device) if c.name == name
        )
        return resident_peak(case.our_epoch if ours else case.their_epoch)


def _recipe(settings: BenchSettings, device: torch.device) -> Rows:
    """The paper's whole experiment on CUB: two epochs of each training, scaled by their number."""
    species, images, epochs = (8, 6, 1) if settings.quick else (200, 59, 2)
    data = settings.data / "bench-cub"
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
            train(run, seen.append)
            done = [event for event in seen if isinstance(event, EpochDone) and event.epoch]
            seconds[name] = statistics.median(event.seconds for event in done)
            speed = statistics.median(event.images_per_second for event in done)
            yield Measurement(f"CUB recipe, one {name} epoch of {count}", seconds[name], note=f"{speed:,.0f} images/s")
    total = decoding + 40 * seconds["teacher"] + 80 * seconds["student"]
    yield Measurement(
        f"CUB recipe, all of it ({species * images:,} images, 40 + 80 epochs), scaled from {epochs} epochs of each",
        total,
        note=f"of it {decoding:.0f} s to decode every image once",
    )


PARTS: dict[str, Callable[[BenchSettings, torch.device], Rows]] = {
    "angle": _angle,
    "distance": _distance,
    "miners": measure_miners,
    "recall": measure_recall,
    "loader": _loader,
    "step": _step,
    "epoch": _epoch,
    "teachers": _teachers,
    "embed": _embed,
    "search": measure_search,
    "chunk": measure_chunk,
    "ranks": _ranks,
    "recipe": _recipe,
}
