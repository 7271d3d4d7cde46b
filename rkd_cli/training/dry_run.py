"""Estimate what a training takes: time some of its steps and extrapolate. Nothing is written."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from rkd_cli.data.cache import free_space
from rkd_cli.data.loader import Batch, DeviceReader, EvalLoader
from rkd_cli.data.sets.demo import FOLDER
from rkd_cli.embedding.batches import embed_batch
from rkd_cli.events import Progress, Reporter, RunStarted, silent
from rkd_cli.metrics import agreement, at_r, recall_at_k
from rkd_cli.models import EmbeddingNet
from rkd_cli.runtime.context import processes_here
from rkd_cli.runtime.distributed import ranks
from rkd_cli.runtime.doctor import main_memory, memory_limit, peak_memory
from rkd_cli.schemas import Position
from rkd_cli.settings import DistillSettings, TeacherSettings
from rkd_cli.training.loop import AT_R, Run, train_step
from rkd_cli.training.open import open_run
from rkd_cli.training.plan import plan_run
from rkd_cli.training.run_directory import RunDirectory
from rkd_cli.training.samples import Once, Samples, pace
from rkd_cli.training.step import DistillStep, TeacherStep
from rkd_cli.training.teachers import LiveTeacher

_NEIGHBORS = 4096  # images to time recall on


@dataclass(frozen=True)
class DryRun:
    """What a training does and takes. Seconds and memory are measured and extrapolated."""

    started: RunStarted
    weights: str  # initial weights
    image_size: int  # of batches
    resized_to: dict[str, int]  # {network: the only size it takes}, if that is not image_size
    batch: int
    once: dict[str, Once]  # {work: its cost}, summed over all runs
    step_seconds: tuple[float, ...]  # of each objective
    bf16_seconds: float | None  # of a step of the last objective with --precision bf16; None: not asked
    evaluation_seconds: float  # of all measured splits
    teacher_seconds: float  # of evaluating the teacher
    seconds: tuple[float, ...]  # left of each run, with evaluations
    memory: int | None  # peak bytes, on the GPU if there is one
    memory_total: int | None
    run_bytes: int  # size of a run's directory
    run_free: int  # free bytes on its disk


def dry_run(runs: Sequence[TeacherSettings | DistillSettings], report: Reporter) -> DryRun:
    """Estimate what runs take that differ in seed and directory only. The first one is measured.

    Raises:
        RkdError: every error that the real runs would raise.
    """
    samples, first = Samples(), runs[0]
    absent = first.dataset == "demo" and not (first.data / FOLDER).exists()
    with TemporaryDirectory() if absent else nullcontext(first.data) as data, ranks().first():
        plans = [
            plan_run(settings.model_copy(update={"data": Path(data)}), silent if settings is not first else report)
            for settings in runs
        ]
        for plan in plans:
            if plan.checked[0]:
                samples.add("looking for damaged images", Once(plan.checked[0], "images", plan.checked[1]))
        run, *_ = [open_run(plan, silent if plan is not plans[0] else report, samples) for plan in plans]
    weights = "of the run" if run.directory.resumed else str(first.load or first.weights)
    return measure(run, [plan.directory for plan in plans], samples, weights, report)


def measure(run: Run, directories: Sequence[RunDirectory], samples: Samples, weights: str, report: Reporter) -> DryRun:
    """Time the evaluation, the teacher and the steps of a run, which spoils its weights.

    ``directories`` are those of all estimated runs, this one's first.
    """
    context, total = run.context, 2 + len(run.started.objectives)
    places = [directory.resumed or Position() for directory in directories]
    images = {name: len(loader.images) for name, loader in run.evaluation.items()}
    loader, size = run.evaluation["eval"].whole(), context.ranks.size
    run.embedder.eval()
    image_seconds = pace(_passes(loader, lambda batch: embed_batch(run.embedder, batch, context)), context) / size
    evaluation = sum(image_seconds * count + _metrics_seconds(run, count) for count in images.values())
    report(Progress("Measuring", 1, total, "parts"))
    teacher, of_teacher = run.teacher, 0.0
    if isinstance(teacher, LiveTeacher):
        passes = _passes(loader, lambda batch: teacher.view(context.to_device(batch.images), batch, False))
        image_seconds = pace(passes, context) / size
        names = images.keys() - ({"val"} if run.has_labels else ())
        of_teacher = sum(image_seconds * images[name] for name in names)
    report(Progress("Measuring", 2, total, "parts"))
    steps = []
    for done, (first, _) in enumerate(_stages(run), 3):
        steps.append(pace(_steps(run, first), run.context))
        report(Progress("Measuring", done, total, "parts"))
    bf16 = pace(_steps(_in_bf16(run), run.epochs), context) if context.bf16_inference else None
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
        bf16_seconds=bf16,
        evaluation_seconds=evaluation,
        teacher_seconds=of_teacher,
        seconds=tuple(_left(run, at, steps, evaluation, of_teacher) for at in places),
        memory=memory,
        memory_total=memory_total,
        run_bytes=_run_bytes(run),
        run_free=free_space(run.directory.path),
    )


def _passes(loader: EvalLoader, embed: Callable[[Batch], object]) -> Iterator[int]:
    for batch in itertools.chain.from_iterable(itertools.repeat(loader)):
        embed(batch)
        yield len(batch.images)


def _in_bf16(run: Run) -> Run:
    assert isinstance(run.step, TeacherStep | DistillStep)
    step = copy.copy(run.step)
    step.context = replace(run.context, precision="bf16")
    return replace(run, step=step)


def _steps(run: Run, epoch: int) -> Iterator[int]:
    run.begin_training()
    while True:
        for step, batch in enumerate(run.loader.epoch(epoch), 1):
            train_step(run, batch, epoch, step)
            yield 1


def _metrics_seconds(run: Run, count: int) -> float:
    """Seconds to compute the metrics of ``count`` embeddings, which grow with its square."""
    tried = min(count, _NEIGHBORS)
    embeddings = torch.randn(tried, run.model.embedding_size, device=run.context.device)
    labels = torch.arange(tried, device=run.context.device) // 2

    def metrics() -> Iterator[int]:
        for _ in range(2):
            _ = recall_at_k(embeddings, labels, run.ks) if run.has_labels else agreement(embeddings, embeddings)
            if run.select_by in AT_R:
                at_r(embeddings, labels)
            yield 1

    processes = run.context.ranks.size if run.has_labels else 1  # recall is divided among them
    return pace(metrics(), run.context) * (count / tried) ** 2 / processes


def _stages(run: Run) -> list[tuple[int, int]]:
    """(first, last) epoch of each objective."""
    stages, first = [], 1
    for objective in run.started.objectives:
        last = min(run.epochs, objective.epochs or run.epochs)
        if first <= last:
            stages.append((first, last))
        first = last + 1
    return stages


def _left(run: Run, at: Position, steps: Sequence[float], evaluation: float, teacher: float) -> float:
    """Seconds left of a run at that position."""
    first = max(1, at.epoch)
    epochs = [max(0, last - max(start, first) + 1) for start, last in _stages(run)]
    training = sum(count * len(run.loader) * step for count, step in zip(epochs, steps, strict=True))
    for (start, last), step in zip(_stages(run), steps, strict=True):
        training -= at.step * step if start <= at.epoch <= last else 0.0
    measured = max(0, run.epochs // run.eval_every - (first - 1) // run.eval_every)
    measured += bool(first <= run.epochs and run.epochs % run.eval_every) + (at.epoch == 0)
    evaluates_teacher = not at.figures if run.has_labels else first <= run.epochs
    return training + measured * evaluation + evaluates_teacher * teacher


def _resized_to(run: Run) -> dict[str, int]:
    sides = {"student" if run.teacher else "network": run.model.normalization.input_size}
    if isinstance(run.teacher, LiveTeacher) and isinstance(run.teacher.network, EmbeddingNet):
        sides["teacher"] = run.teacher.network.normalization.input_size
    return {name: side for name, side in sides.items() if side and side != run.header.image_size}


def _memory(run: Run, samples: Samples) -> tuple[int | None, int | None]:
    """Peak bytes and total bytes."""
    device = run.context.device
    if device.type == "cuda":
        left_out = samples.pixels_left_out if run.loader.what == DeviceReader.what else 0
        return torch.cuda.max_memory_allocated(device) + left_out, torch.cuda.mem_get_info(device)[1]
    limits = [limit for limit in (main_memory().total, memory_limit()) if limit]
    peak = peak_memory()
    return peak and peak * processes_here(), min(limits, default=None)


def _run_bytes(run: Run) -> int:
    """Bytes of two models and two resume states: weights and two averages per trained weight."""
    model: int = sum(tensor.nbytes for tensor in run.model.state_dict().values())
    learner: int = sum(tensor.nbytes for tensor in run.learner.state_dict().values())
    averages: int = sum(2 * p.nbytes for group in run.optimizer.param_groups for p in group["params"])
    return 2 * model + 2 * (learner + averages)
