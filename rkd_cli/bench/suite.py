"""Our code beside the textbook formula, in one process: time, memory, and the ratio of the two."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import cycle, islice
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils.data import DataLoader

from rkd_cli import __version__
from rkd_cli.bench import textbook
from rkd_cli.bench.chunk import measure_chunk
from rkd_cli.bench.embed import measure_embed
from rkd_cli.bench.measure import (
    Measurement,
    beside,
    default_precision,
    free_memory,
    one_thread,
    resident_peak,
    seconds_of,
)
from rkd_cli.bench.ranks import measure_ranks
from rkd_cli.bench.search import measure_search
from rkd_cli.bench.teachers import measure_teachers
from rkd_cli.data import BalancedBatchSampler, ImageSet, load_dataset
from rkd_cli.data.cache import make_cache
from rkd_cli.data.decode import random_crops
from rkd_cli.data.loader import Batch, FileReader
from rkd_cli.data.sets.demo import make_demo
from rkd_cli.events import EpochDone, Event, Progress, Reporter, silent
from rkd_cli.losses import RKDAngle, RKDDistance, TripletLoss
from rkd_cli.metrics import recall_at_k
from rkd_cli.mining import AllPairs, DistanceWeighted, SemiHardNegative
from rkd_cli.models import build_model
from rkd_cli.models.checkpoint import save_model
from rkd_cli.runtime.context import device_name, make_context
from rkd_cli.runtime.doctor import processor_name
from rkd_cli.settings import BenchSettings, DistillSettings, TeacherSettings
from rkd_cli.training.build import build_distill_run, build_teacher_run
from rkd_cli.training.loop import Run, train
from rkd_cli.training.step import update_weights

_SIDE = 433  # pixels: as many as CUB's 500 x 375 have
_KS = (1, 2, 4, 8)
_TEXTBOOK_UP_TO = 512  # rows; its angle loss would take some 25 GB at 1024
_STUDENT, _TEACHER = 128, 512  # dimensions


Rows = Iterator[Measurement]


def run_bench(settings: BenchSettings, parts: Sequence[str], report: Reporter) -> list[Measurement]:
    """The measurements of the parts, in their order.

    Raises:
        RkdError: images that cannot be had.
    """
    device = make_context(settings.device, "fp32").device
    if {"step", "epoch", "teachers"} & set(parts):
        _sampler(settings, _images(settings)[0])  # what is wrong with it is said now, not after minutes
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
        yield _relation(f"RKD-A, N={n}", RKDAngle(), textbook.angle_loss, n, device)


def _distance(settings: BenchSettings, device: torch.device) -> Rows:
    for n in (16, 32) if settings.quick else (64, 128, 256, 512, 2048):
        yield _relation(f"RKD-D, N={n}", RKDDistance(), textbook.distance_loss, n, device)


def _relation(work: str, ours: nn.Module, formula: Any, n: int, device: torch.device) -> Measurement:
    """Forward and backward."""
    student = torch.randn(n, _STUDENT, device=device, requires_grad=True)
    teacher = F.normalize(torch.randn(n, _TEACHER, device=device), dim=1)
    huge = formula is textbook.angle_loss and n > _TEXTBOOK_UP_TO
    return beside(
        work,
        lambda: _gradient(ours(student, teacher)),
        None if huge else lambda: _gradient(formula(student, teacher)),
        device,
        resident=huge,
    )


def _gradient(loss: Tensor) -> None:
    loss.backward()  # type: ignore[no-untyped-call]


def _miners(settings: BenchSettings, device: torch.device) -> Rows:
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


def _recall(settings: BenchSettings, device: torch.device) -> Rows:
    n = 500 if settings.quick else 20_000
    labels = torch.arange(n, device=device) // 20
    x = F.normalize(torch.randn(n, 512, device=device) + torch.randn(n // 20, 512, device=device)[labels] / 8, dim=1)
    fits = free_memory(device) > 5 * 4 * n * n
    yield beside(
        f"Recall@1,2,4,8 of {n:,} x 512",
        lambda: recall_at_k(x, labels, _KS),
        (lambda: textbook.recall(x, labels, _KS)) if fits else None,
        device,
    )


def _loader(settings: BenchSettings, device: torch.device) -> Rows:
    """On one core: both decode and crop in as many processes as there are."""
    resize, side, batch = (40, 32, 8) if settings.quick else (256, 224, 128)
    images = _images(settings)[0]
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
        for case in _cases(settings, Path(scratch), device):
            row = beside(f"one {case.name} step, batch of {settings.batch}", case.our_step, case.their_step, device)
            yield replace(row, note=f"{settings.batch / row.seconds:,.0f} images/s")


def _epoch(settings: BenchSettings, device: torch.device) -> Rows:
    """Training and the evaluation of both splits, with a warm cache."""
    with TemporaryDirectory(prefix="rkd-bench-") as scratch:
        for case in _cases(settings, Path(scratch), device):
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
    return measure_teachers(settings, *_place(settings), device)


def _embed(settings: BenchSettings, device: torch.device) -> Rows:
    yield measure_embed(settings, *_place(settings), device)


def _ranks(settings: BenchSettings, device: torch.device) -> Rows:
    return measure_ranks(settings, *_place(settings))


def _epoch_memory(settings: BenchSettings, name: str, ours: bool) -> int | None:
    """In a process of its own: in this one the heap has grown already."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(_epoch_memory_here, settings, name, ours).result()


def _epoch_memory_here(settings: BenchSettings, name: str, ours: bool) -> int | None:
    with TemporaryDirectory(prefix="rkd-bench-") as scratch:
        case = next(
            c for c in _cases(settings, Path(scratch), make_context(settings.device, "fp32").device) if c.name == name
        )
        return resident_peak(case.our_epoch if ours else case.their_epoch)


@dataclass(frozen=True)
class _Case:
    """One training, ours and the textbook's."""

    name: str
    run: Run
    our_step: Callable[[], object]
    their_step: Callable[[], object]
    their_epoch: Callable[[], object]

    def our_epoch(self) -> EpochDone:
        seen: list[Event] = []
        train(self.run, seen.append)
        return next(event for event in seen if isinstance(event, EpochDone) and event.epoch)


def _cases(settings: BenchSettings, scratch: Path, device: torch.device) -> Iterator[_Case]:
    """Teacher training, then distillation from that teacher."""
    places = {"cache": "disk", "cache_dir": scratch / "cache", "overwrite": True, "weights": "none", "epochs": 1}
    chosen = settings.model_dump(include=set(TeacherSettings.model_fields) - {"base", "dataset", "data", "save_dir"})
    dataset, data = _place(settings)
    common: dict[str, Any] = chosen | places | {"dataset": dataset, "data": data}
    teacher_run = build_teacher_run(
        TeacherSettings(**common, base=settings.teacher_base, save_dir=scratch / "teacher"), silent
    )
    checkpoint = scratch / "teacher.safetensors"
    save_model(checkpoint, teacher_run.model.state_dict(), teacher_run.header)
    miner = DistanceWeighted(published=True)
    teacher = _plain(settings.teacher_base, 512, True, device)

    def teacher_loss(images: Tensor, labels: Tensor) -> Tensor:
        embeddings = teacher(images)
        return textbook.triplet_loss(embeddings, miner(embeddings, labels), 0.2)

    yield _case("teacher", settings, teacher_run, teacher, teacher_loss)

    distill_run = build_distill_run(
        DistillSettings(**common, base=settings.base, teacher_load=checkpoint, save_dir=scratch / "student"), silent
    )
    student, frozen = _plain(settings.base, 64, False, device), _plain(settings.teacher_base, 512, True, device).eval()

    def distill_loss(images: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            taught = frozen(images)
        learned = student(images)
        return textbook.distance_loss(learned, taught) + 2 * textbook.angle_loss(learned, taught)

    yield _case("distillation", settings, distill_run, student, distill_loss)


def _case(name: str, settings: BenchSettings, run: Run, network: nn.Module, loss: textbook.Step) -> _Case:
    batch = next(run.loader.epoch(1))
    batch = Batch(*map(run.context.to_device, batch))

    def our_step() -> None:
        run.model.train()
        update_weights(run.optimizer, run.step(batch, 1))

    optimizer = torch.optim.Adam(network.parameters(), lr=settings.lr, weight_decay=1e-5)
    floats = run.model.normalize(batch.images).contiguous()
    train_set, eval_set = _images(settings)
    sides = settings.resize, settings.image_size
    sampler = _sampler(settings, train_set)
    workers: dict[str, Any] = {"num_workers": settings.workers}
    loader: Any = DataLoader(
        textbook.Images(train_set.paths, train_set.labels or (), *sides, train=True), batch_sampler=sampler, **workers
    )
    loaders: list[Any] = [
        DataLoader(textbook.Images(split.paths, split.labels or (), *sides, train=False), settings.batch, **workers)
        for split in (train_set, eval_set)
    ]

    fixed: Any = [(floats, batch.labels)]

    def their_step() -> None:
        with default_precision(run.context.device):
            textbook.train_epoch(network, loss, fixed, optimizer)

    def their_epoch() -> None:
        with default_precision(run.context.device):
            textbook.train_epoch(network, loss, loader, optimizer)
            for split in loaders:
                textbook.evaluate(network, split, _KS)

    return _Case(name, run, our_step, their_step, their_epoch)


def _sampler(settings: BenchSettings, images: ImageSet) -> BalancedBatchSampler:
    each, batches = settings.num_image_per_class, settings.iter_per_epoch
    return BalancedBatchSampler(images.labels, settings.batch, each, batches, settings.seed)


def _plain(base: str, size: int, l2normalize: bool, device: torch.device) -> nn.Module:
    model = build_model(base, size, l2normalize)
    layers = [model.base, nn.Flatten(), model.linear]
    return nn.Sequential(*layers, *([textbook.UnitLength()] if l2normalize else [])).to(device)


def _recipe(settings: BenchSettings, device: torch.device) -> Rows:
    """The paper's whole experiment on CUB: two epochs of each training, scaled by their number."""
    species, images, epochs = (8, 6, 1) if settings.quick else (200, 59, 2)
    data = settings.data / "bench-cub"
    make_demo(data, species=species, images=images, size=60 if settings.quick else _SIDE)
    seconds: dict[str, float] = {}
    with TemporaryDirectory(prefix="rkd-bench-") as scratch:
        small = {"batch": 8, "num_image_per_class": 2, "iter_per_epoch": 2, "resize": 40, "image_size": 32}
        common: dict[str, Any] = {"dataset": "cub200", "data": data, "weights": "none", "epochs": epochs}
        common |= {"device": settings.device, "precision": settings.precision, "compile": settings.compile}
        common |= {"cache_dir": Path(scratch, "cache")} | (small if settings.quick else {})
        start = time.perf_counter()
        teacher = TeacherSettings(**common, save_dir=Path(scratch, "teacher"))
        run = build_teacher_run(teacher, silent)
        decoding = time.perf_counter() - start
        checkpoint = teacher.save_dir / "best.safetensors"
        for name, count in (("teacher", 40), ("student", 80)):
            if name == "student":
                run = build_distill_run(
                    DistillSettings(**common, teacher_load=checkpoint, save_dir=Path(scratch, "student")), silent
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


def _images(settings: BenchSettings) -> tuple[ImageSet, ImageSet]:
    return load_dataset(*_place(settings))


PARTS: dict[str, Callable[[BenchSettings, torch.device], Rows]] = {
    "angle": _angle,
    "distance": _distance,
    "miners": _miners,
    "recall": _recall,
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


def _place(settings: BenchSettings) -> tuple[str, Path]:
    """The data set that is asked for, or drawn JPEGs as large as CUB's."""
    if settings.dataset:
        return settings.dataset, settings.data
    folder = settings.data / ("bench-small" if settings.quick else "bench-birds")
    # half of the species fill the default batch
    make_demo(folder, species=26, images=10, size=60 if settings.quick else _SIDE)
    return "cub200", folder
