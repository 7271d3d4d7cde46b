"""The part ``gpu``: the paper's trainings, then losses and metrics, in minutes on a GPU.

No piece starts after ``_SECONDS``. A piece that fails is named in a note, and the others still run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from multiprocessing import Pipe, get_context
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rkd_cli.bench import textbook
from rkd_cli.bench.cases import KS, SIDE, Case, cases, images_of, sampler_of
from rkd_cli.bench.measure import Measurement, Meter, traced
from rkd_cli.bench.reference import training
from rkd_cli.bench.suite import measure_miners, measure_recall, relation, relation_of
from rkd_cli.data.sets.demo import make_demo
from rkd_cli.errors import SettingsError, first_line
from rkd_cli.events import Note, Progress, Reporter, silent
from rkd_cli.losses import RKDAngle, RKDDistance
from rkd_cli.metrics import at_r, recall_at_k
from rkd_cli.runtime.context import make_context, worker_count
from rkd_cli.runtime.timing import Timer
from rkd_cli.settings import BenchSettings, DistillSettings, TeacherSettings
from rkd_cli.training.dry_run import dry_run
from rkd_cli.training.teachers import LiveTeacher

_SECONDS = 330.0  # no piece starts later
_COMPILING = 50.0  # seconds for all sizes of a loss: compiling RKD-A's unrolled loop takes minutes
_MILLION = 90.0  # seconds for all metrics of a million rows
_PACED = 10  # steps without synchronization in between
_READERS = {"device": "on the device", "disk": "mapped from a file", "none": "streamed, decoded each time"}
_PAPER = {
    "teacher_base": "resnet50", "base": "resnet18", "batch": 128, "num_image_per_class": 5, "iter_per_epoch": 100,
    "resize": 256, "image_size": 224,
}  # fmt: skip
_TOY = {
    "teacher_base": "shufflenet_v2_x0_5", "base": "shufflenet_v2_x0_5", "batch": 10, "iter_per_epoch": 2, "resize": 36,
    "image_size": 32,
}  # fmt: skip

Rows = Iterator[Measurement]


def check_gpu(settings: BenchSettings) -> None:
    """Raise a SettingsError without a GPU and without ``--quick``."""
    if make_context(settings.device, "fp32").device.type != "cuda" and not settings.quick:
        raise SettingsError("PART gpu: no CUDA device. Pass --quick to run toy sizes on the CPU.")


def run_gpu(settings: BenchSettings, report: Reporter) -> list[Measurement]:
    """Run all pieces, the most important first, and note those that there is no time for.

    Raises:
        RkdError: missing images, or no GPU.
    """
    check_gpu(settings)
    device, start = make_context(settings.device, "fp32").device, time.monotonic()
    settings = _paper(settings, device)
    sampler_of(settings, images_of(settings)[0])  # raises errors before measuring
    rows: list[Measurement] = []
    with TemporaryDirectory(prefix="rkd-bench-") as scratch:
        pieces: dict[str, Callable[[Meter], Rows]] = {
            "steps": partial(_steps, settings, Path(scratch)),
            "readers": partial(_readers, settings, Path(scratch)),
            "recipe": partial(_recipe, settings, Path(scratch)),
            "losses": partial(_losses, settings),
            "miners and recall": partial(_miners_and_recall, settings),
            "a million rows": partial(_million, settings),
            "compiled losses": partial(_compiled, settings, report),
        }
        for number, (name, piece) in enumerate(pieces.items()):

            def tell(what: str, number: int = number) -> None:
                report(Progress(f"Measuring {what}", number, len(pieces), "pieces"))

            make_context(settings.device, "fp32")  # the previous piece may have enabled TF32
            torch.manual_seed(settings.seed)
            if time.monotonic() - start >= _SECONDS:
                report(Note(f"{name}: left out, because {time.monotonic() - start:.0f} s are over"))
                continue
            try:
                for row in piece(Meter(device, tell=tell)):
                    rows.append(row)  # one by one: rows before a failure count
            except Exception as error:  # untested GPUs may raise anything
                report(Note(f"{name}: failed after {len(rows)} rows ({first_line(error)})"))
    return rows


def _paper(settings: BenchSettings, device: torch.device) -> BenchSettings:
    """The paper's sizes, and images that fill its batches."""
    sizes: dict[str, Any] = (
        dict(_TOY, workers=0) if settings.quick else dict(_PAPER, workers=worker_count(None, device))
    )
    if not settings.dataset:
        species, side = (8, 60) if settings.quick else (52, SIDE)
        folder = settings.data / ("bench-toy" if settings.quick else "bench-gpu")
        sizes |= {"dataset": "cub200", "data": make_demo(folder, species=species, images=6, size=side)}
    return settings.model_copy(update=sizes)


def _steps(settings: BenchSettings, scratch: Path, meter: Meter) -> Rows:
    """Steps of a batch on the device, and the fraction of their time outside the networks."""
    device = meter.device
    precisions = ["fp32", "tf32"] if device.type == "cuda" else ["fp32"]
    if device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False):
        precisions.append("bf16")
    for precision in precisions:
        for case in cases(settings.model_copy(update={"precision": precision}), scratch):
            textbooks = training(settings, case.name, device)["step"]
            row = meter.compare(f"one {case.name} step, batch of {settings.batch}, {precision}", case.step, textbooks)
            alone = statistics.median(meter.times(partial(_networks_alone, case)))
            pace = Timer("step()", globals={"step": case.step}, num_threads=torch.get_num_threads()).timeit(_PACED).mean
            notes = [
                f"{settings.batch / row.seconds:,.0f} images/s",
                f"{1 - alone / row.seconds:.1%} of the step is not the networks' forward and backward",
                traced(case.step, device).told(pace),
            ]
            yield replace(row, note=", ".join(notes))


def _networks_alone(case: Case) -> None:
    """Forward and backward pass of the same batch, with a sum as loss and without optimizer."""
    run = case.run
    run.optimizer.zero_grad(set_to_none=True)
    if isinstance(run.teacher, LiveTeacher):
        run.teacher.view(case.batch.images, case.batch, False)
    with run.context.autocast():
        embeddings = run.model(case.batch.images)
    embeddings.float().sum().backward()  # type: ignore[no-untyped-call]


def _readers(settings: BenchSettings, scratch: Path, meter: Meter) -> Rows:
    """The steps of an epoch, without its evaluation, by source of the pixels."""
    for cache, where in _READERS.items():
        for case in cases(settings, scratch, cache):
            steps = f"{settings.iter_per_epoch} steps, {case.run.context.precision}"
            work = f"one {case.name} epoch's {steps}, pixels {where}"
            meter.tell(work)
            step = statistics.median(meter.times(case.step))
            speed = case.epoch().images_per_second
            yield Measurement(
                work,
                settings.iter_per_epoch * settings.batch / speed,
                note=f"{speed:,.0f} images/s, {speed * step / settings.batch:.2f} of the speed of a fixed batch",
            )


def _recipe(settings: BenchSettings, scratch: Path, meter: Meter) -> Rows:
    """The paper's experiment on CUB by a dry run. Its images are links to a few files."""
    meter.tell("the CUB recipe, by a dry run")
    species, each = (8, 6) if settings.quick else (200, 59)
    chosen = settings.model_dump(
        include={"resize", "image_size", "batch", "num_image_per_class", "device", "precision", "compile"}
    )
    places = {"dataset": "cub200", "data": _links(settings, scratch / "cub", species, each), "weights": "none"}
    common: dict[str, Any] = chosen | places | {"cache_dir": scratch / "none"}
    teacher = TeacherSettings(**common, base=settings.teacher_base, save_dir=scratch / "whole-teacher")
    student = DistillSettings(
        **common, base=settings.base, save_dir=scratch / "whole-student", teacher=str(scratch / "teacher.safetensors")
    )
    precision = make_context(settings.device, settings.precision).precision
    found = dry_run([teacher], silent), dry_run([student], silent)
    decoding = sum(work.seconds for work in found[0].once.values())  # only once: the student reads the cache
    steps = " and ".join(f"{1000 * one.step_seconds[0]:.1f} ms" for one in found)
    evaluations = " and ".join(f"{one.evaluation_seconds:.1f} s" for one in found)
    yield Measurement(
        f"CUB recipe, all of it ({species * each:,} images, {teacher.epochs} + {student.epochs} epochs), {precision}, "
        "extrapolated",
        decoding + sum(one.seconds[0] for one in found),
        note=f"from steps of {steps}, evaluations of {evaluations}, {decoding:.0f} s to decode every image once",
    )


def _links(settings: BenchSettings, folder: Path, species: int, each: int) -> Path:
    """A data set in the layout of CUB, of links to the images of the benchmark."""
    paths = [path.resolve() for images in images_of(settings) for path in images.paths]
    names = [f"{number // each}/{number}{paths[0].suffix}" for number in range(species * each)]
    for number, name in enumerate(names):
        link = folder / "images" / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(paths[number % len(paths)])
    labels = [str(number // each + 1) for number in range(len(names))]
    classes = [str(number) for number in range(species)]
    for title, lines in (("images", names), ("image_class_labels", labels), ("classes", classes)):
        text = "".join(f"{number} {line}\n" for number, line in enumerate(lines, 1))
        (folder / f"{title}.txt").write_text(text, encoding="utf-8")
    return folder


def _losses(settings: BenchSettings, meter: Meter) -> Rows:
    for name, loss, formula in _named():
        for n in _sizes(settings):
            yield relation(f"{name}, N={n}", loss, formula, n, meter)


def _named() -> list[tuple[str, nn.Module, Callable[[Tensor, Tensor], Tensor]]]:
    return [("RKD-A", RKDAngle(), textbook.angle_loss), ("RKD-D", RKDDistance(), textbook.distance_loss)]


def _sizes(settings: BenchSettings) -> tuple[int, ...]:
    return (16,) if settings.quick else (128, 256, 512, 1024, 2048, 4096)


def _compiled(settings: BenchSettings, report: Reporter, meter: Meter) -> Rows:
    """Each compiled loss in its own process, which is ended when its time is up."""
    for name, loss, _ in _named():
        receiver, sender = Pipe(duplex=False)
        arguments = (sender, f"{name}, N={{}}: compiled against uncompiled", loss, settings, meter.device)
        meter.tell(f"{name}, compiled")
        process = get_context("spawn").Process(target=_compile, args=arguments, daemon=True)
        process.start()
        sender.close()  # the process has its own: ``recv`` ends when that one closes
        end = time.monotonic() + _COMPILING
        try:
            while receiver.poll(max(0.0, end - time.monotonic())):
                found = receiver.recv()
                if isinstance(found, Measurement):
                    yield found
                else:
                    report(Note(found))
            report(Note(f"{name}, compiled: {_COMPILING:.0f} s are over, more rows are left out"))
        except EOFError:  # the process is done
            process.join(10)
            if process.exitcode:
                report(Note(f"{name}, compiled: its process died, more rows are left out"))
        finally:
            process.terminate()
            process.join()


def _compile(sender: Connection, work: str, loss: nn.Module, settings: BenchSettings, device: torch.device) -> None:
    """Send a measurement or an error message for each size, smallest first."""
    backend = "eager" if settings.quick else "inductor"  # eager needs no C++ compiler
    for n in _sizes(settings):
        torch._dynamo.reset()
        compiled = torch.compile(loss, dynamic=False, backend=backend)
        try:
            ours, uncompiled = (relation_of(form, n, device) for form in (compiled, loss))
            sender.send(Meter(device).compare(work.format(n), ours, uncompiled))
        except Exception as error:  # compilers raise many types
            sender.send(f"{work.format(n)}: {first_line(error)}")
    sender.close()


def _miners_and_recall(settings: BenchSettings, meter: Meter) -> Rows:
    yield from measure_miners(settings, meter)
    yield from measure_recall(settings, meter)


def _million(settings: BenchSettings, meter: Meter) -> Rows:
    """Metrics of a million rows, or of a tenth if the time does not suffice."""
    whole = 1_000 if settings.quick else 1_000_000
    left = _MILLION
    metrics: dict[str, Callable[[Tensor, Tensor], object]] = {
        "Recall@1,2,4,8": partial(recall_at_k, ks=KS),
        "R-Precision and MAP@R": at_r,
    }
    for name, metric in metrics.items():
        tenth = meter.once(f"{name} of {whole // 10:,} x 128", partial(metric, *_rows(whole // 10, meter.device)))
        scaled = 100 * tenth.seconds  # every row is compared with every other
        if scaled < left:
            left -= scaled
            yield meter.once(f"{name} of {whole:,} x 128", partial(metric, *_rows(whole, meter.device)))
        else:
            yield replace(tenth, note=f"{whole:,} would take some {scaled:.0f} s")


def _rows(n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(N, 128) embeddings and (N,) labels in classes of 20."""
    labels = torch.arange(n, device=device) // 20
    centers = torch.randn(n // 20, 128, device=device)
    return F.normalize(torch.randn(n, 128, device=device) + centers[labels] / 4, dim=1), labels
