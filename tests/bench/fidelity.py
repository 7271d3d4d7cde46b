"""Students of our loop beside students of the plain loop: whether what was made faster still learns as much.

Both sides distil the same teacher by RKD-DA, or learn from labels by the triplet loss (``--loss triplet``). For a seed
both start from the same initial weights, those that our run draws; from there on each draws its own batches and crops.
That makes the differences between pairs less noisy.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import connection, get_context
from pathlib import Path
from typing import Any, Literal

import numpy as np
import scipy.stats
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils.data import DataLoader

from figures import asked
from rkd_cli.bench import textbook
from rkd_cli.bench.suite import machine
from rkd_cli.data import BalancedBatchSampler, load_dataset
from rkd_cli.errors import RunError, SettingsError
from rkd_cli.events import Event, Note, Progress, Reporter, silent
from rkd_cli.mining import DistanceWeighted
from rkd_cli.models import EmbeddingNet, build_model, load_model
from rkd_cli.models.checkpoint import read_checksum, read_header
from rkd_cli.report.text import percent
from rkd_cli.runtime.context import make_context
from rkd_cli.runtime.files import write_json, write_text
from rkd_cli.runtime.seeds import derive_seed
from rkd_cli.schemas import EpochDone
from rkd_cli.screen.terminal import progress_lines
from rkd_cli.settings import BenchSettings, DistillSettings, TeacherSettings
from rkd_cli.training.loop import Run, train
from rkd_cli.training.open import build_run

_MILESTONES, _GAMMA = (5, 7), 0.5
_TEACHER = 128  # dimensions
_WEIGHT_DECAY = 1e-5
_SIDES = ("ours", "plain")
# what decides the figures of a results folder; the rest is how many there are and how fast they come
_DECIDES = {
    "dataset", "data", "resize", "image_size", "teacher_base", "base", "batch", "num_image_per_class", "iter_per_epoch",
    "lr", "precision", "compile", "quick", "loss", "weights", "freeze_bn", "dimensions", "epochs",
}  # fmt: skip


_SHARED = {
    "data", "resize", "image_size", "batch", "num_image_per_class", "iter_per_epoch", "lr", "precision", "compile",
    "workers", "device",
}  # fmt: skip


class FidelitySettings(BenchSettings):
    """What the trainings are, and how many."""

    teacher: Path | None = Field(None, description="Teacher of all students, a checkpoint. If not given: train one.")
    loss: Literal["rkd", "triplet"] = Field("rkd", description="What students learn by.")
    weights: str = Field("none", description="Initial weights of the students' backbone. none: random.")
    freeze_bn: bool = Field(False, description="Freeze the statistics of the students' batch norms.")
    dimensions: int = Field(32, ge=1, description="Embedding size of the students.")
    epochs: int = Field(8, ge=1, description="Number of epochs of all trainings.")
    seeds: int = Field(8, ge=2, le=1000, description="Number of students per loop (seeds 1 to N).")
    jobs: int | None = Field(None, ge=1, description="Number of students to train at once. If not given: one per core.")
    save_dir: Path = Field(Path("fidelity"), description="Directory for results. Results in it are not computed again.")


@dataclass(frozen=True)
class Student:
    """A finished training: unseen Recall@1 (a fraction) and mean loss after each epoch."""

    side: str
    seed: int
    recalls: list[float]
    losses: list[float]
    seconds: float

    @property
    def best(self) -> float:
        """The highest recall of all epochs."""
        return max(self.recalls)

    @property
    def last(self) -> float:
        """The recall of the last epoch."""
        return self.recalls[-1]


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 lies outside."""
        return not self.low <= 0 <= self.high


@dataclass(frozen=True)
class Fidelity:
    """The students of both sides in the order of their seeds, and ours minus plain, pair by pair, as fractions."""

    teacher: float | None  # its unseen Recall@1
    ours: list[Student]
    plain: list[Student]
    best: Interval
    last: Interval


def interval_of(differences: Sequence[float]) -> Interval:
    """The mean of paired differences with its 95 % interval by Student's t.

    Args:
        differences: two or more.
    """
    n, mean = len(differences), statistics.fmean(differences)
    half = float(scipy.stats.t.ppf(0.975, n - 1)) * statistics.stdev(differences) / n**0.5
    return Interval(mean, mean - half, mean + half)


def run_fidelity(settings: FidelitySettings, report: Reporter) -> Fidelity:
    """Train the students that ``--save-dir`` does not hold yet, several at once, and compare all of them.

    Args:
        settings: without ``teacher`` a teacher is trained first, and kept beside the results.
        report: is told of each student that is done.
    Returns:
        The students of both sides.
    Raises:
        RkdError: images or a teacher that cannot be had, results of other settings, or a training that failed.
    """
    if settings.teacher and settings.loss == "triplet":
        raise SettingsError("--teacher: has no effect with --loss triplet. Leave it out.")
    train_set, _ = load_dataset(settings.dataset or "demo", settings.data, report)
    # what is wrong with the batch is said now, and not by each of the processes
    BalancedBatchSampler(train_set.labels, settings.batch, settings.num_image_per_class, 1, settings.seed)
    _claim(settings)
    teacher = None if settings.loss == "triplet" else settings.teacher or _trained_teacher(settings, report)
    seeds = range(1, settings.seeds + 1)
    jobs = [(side, seed) for seed in seeds for side in _SIDES]
    missing = [job for job in jobs if not _result_file(settings, *job).exists()]
    if len(missing) < len(jobs):
        report(Note(f"{len(jobs) - len(missing)} of {len(jobs)} students are in {settings.save_dir} already"))
    count = settings.jobs or os.cpu_count() or 1
    done = len(jobs) - len(missing)

    def finished(side: str, seed: int) -> None:
        nonlocal done
        done += 1
        student = _read(settings, side, seed)
        report(Note(f"{side}, seed {seed}: best {100 * student.best:.2f}, last {100 * student.last:.2f}"))
        report(Progress("Training students", done, len(jobs), "students"))

    report(Progress("Training students", done, len(jobs), "students"))
    _in_processes(partial(_job, settings, teacher), missing, count, finished)
    ours, plain = ([_read(settings, side, seed) for seed in seeds] for side in _SIDES)
    return Fidelity(
        teacher=read_header(teacher).eval_recall.get(1, 0.0) if teacher else None,
        ours=ours,
        plain=plain,
        best=interval_of([a.best - b.best for a, b in zip(ours, plain, strict=True)]),
        last=interval_of([a.last - b.last for a, b in zip(ours, plain, strict=True)]),
    )


def _claim(settings: FidelitySettings) -> None:
    """Keep results of different settings apart.

    Raises:
        SettingsError: the folder holds results of others.
    """
    facts = settings.model_dump(mode="json", include=_DECIDES)
    # one that is trained here hangs on the seed; one that is given may be another file tomorrow
    if settings.loss == "rkd":
        facts["teacher"] = read_checksum(settings.teacher) if settings.teacher else f"seed {settings.seed}"
    path = settings.save_dir / "settings.json"
    if path.exists():
        held = json.loads(path.read_text(encoding="utf-8"))
        other = sorted(name for name in facts if held.get(name) != facts[name])
        if other:
            raise SettingsError(
                f"--save-dir {settings.save_dir}: holds results of another {', '.join(other)}: choose another"
            )
        return
    try:
        settings.save_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"--save-dir {settings.save_dir}: cannot be used ({error.strerror})") from None
    write_json(path, facts)


def _common(settings: FidelitySettings) -> dict[str, Any]:
    """What teacher and students share."""
    chosen = settings.model_dump(include=_SHARED)
    schedule = {"lr_decay_epochs": _MILESTONES, "lr_decay_gamma": _GAMMA, "weight_decay": _WEIGHT_DECAY}
    places = {"dataset": settings.dataset or "demo", "cache": "disk", "cache_dir": settings.save_dir / "cache"}
    rest = {"epochs": _epochs(settings), "eval_train": False, "recall": (1,)}
    return chosen | schedule | places | rest


def _epochs(settings: FidelitySettings) -> int:
    return 1 if settings.quick else settings.epochs


def _trained_teacher(settings: FidelitySettings, report: Reporter) -> Path:
    folder = settings.save_dir / "teacher"
    if not (folder / "result.json").exists():  # written at the end: a best epoch alone may be one of a stopped run
        teacher = TeacherSettings(
            **_common(settings),
            weights="none",
            base=settings.teacher_base,
            embedding_size=_TEACHER,
            sample="distance-published",
            seed=settings.seed,
            save_dir=folder,
            resume=True,
        )

        def watched(event: Event) -> None:
            if isinstance(event, EpochDone):
                report(Progress("Training their teacher", event.epoch, teacher.epochs, "epochs"))

        report(Note("training a teacher first, as --teacher names none"))
        train(build_run(teacher, silent), watched)
    return folder / "best.safetensors"


def _result_file(settings: FidelitySettings, side: str, seed: int) -> Path:
    return settings.save_dir / f"{side}-{seed}.json"


def _read(settings: FidelitySettings, side: str, seed: int) -> Student:
    return Student(**json.loads(_result_file(settings, side, seed).read_text(encoding="utf-8")))


def _in_processes(
    work: Callable[[str, int], None],
    jobs: Sequence[tuple[str, int]],
    count: int,
    finished: Callable[[str, int], None],
) -> None:
    """Each job in a process of its own, ``count`` at once. No pool: its processes may not have the loader's workers."""
    waiting = list(jobs)
    running: dict[int, tuple[Any, tuple[str, int]]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < count:
                job = waiting.pop(0)
                process = get_context("spawn").Process(target=work, args=job)
                process.start()
                running[process.sentinel] = process, job
            for sentinel in connection.wait(list(running)):
                assert isinstance(sentinel, int)
                process, job = running.pop(sentinel)
                process.join()
                if process.exitcode:
                    raise RunError(
                        f"the {job[0]} student of seed {job[1]} failed, as is said above (exit code "
                        f"{process.exitcode}); the same command goes on with what is missing"
                    )
                finished(*job)
    finally:
        for process, _ in running.values():
            process.terminate()
            process.join()


def _job(settings: FidelitySettings, teacher: Path | None, side: str, seed: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C reaches all: who started this one ends it
    torch.set_num_threads(1)
    student = (train_ours if side == "ours" else train_plain)(settings, teacher, seed)
    write_json(_result_file(settings, side, seed), asdict(student))


def our_run(settings: FidelitySettings, teacher: Path | None, seed: int) -> Run:
    """The run that ``rkd distill`` or ``rkd train-teacher`` makes of the settings."""
    student = _common(settings) | {
        "base": settings.base,
        "weights": settings.weights,
        "freeze_bn": settings.freeze_bn,
        "embedding_size": settings.dimensions,
        "seed": seed,
        "save_dir": settings.save_dir / f"ours-{seed}",
        "overwrite": True,  # one that was stopped starts again, as the plain one does
    }
    if teacher is None:
        return build_run(TeacherSettings(**student, loss="l2_triplet", l2normalize=True), silent)
    return build_run(DistillSettings(**student, teacher=str(teacher)), silent)


def train_ours(settings: FidelitySettings, teacher: Path | None, seed: int) -> Student:
    """One student by our loop."""
    run = our_run(settings, teacher, seed)
    seen: list[Event] = []
    done = train(run, seen.append)
    shutil.rmtree(run.directory.path)
    rows = [event for event in seen if isinstance(event, EpochDone) and event.epoch]
    losses = [sum(row.losses.values()) for row in rows]
    return Student("ours", seed, [row.figures["eval"]["R@1"] for row in rows], losses, done.result.seconds)


def train_plain(settings: FidelitySettings, teacher: Path | None, seed: int) -> Student:
    """One student by the textbook: its losses, loop, transforms, batches, and an unfused Adam."""
    start = time.monotonic()
    student, step = plain_student(settings, teacher, seed)
    random.seed(seed)  # once, as a script does
    np.random.seed(seed)
    torch.manual_seed(seed)
    train_set, eval_set = load_dataset(settings.dataset or "demo", settings.data)
    assert train_set.labels is not None  # the sampler of our side has seen to that
    assert eval_set.labels is not None
    sides = settings.resize, settings.image_size
    sampler = textbook.ClassBatches(
        train_set.labels, settings.batch, settings.num_image_per_class, settings.iter_per_epoch
    )
    loader: Any = DataLoader(
        textbook.Images(train_set.paths, train_set.labels, *sides, train=True),
        batch_sampler=sampler,
        num_workers=settings.workers,
    )
    evaluation: Any = DataLoader(
        textbook.Images(eval_set.paths, eval_set.labels, *sides, train=False),
        settings.batch,
        num_workers=settings.workers,
    )
    optimizer = torch.optim.Adam(student.parameters(), lr=settings.lr, weight_decay=_WEIGHT_DECAY, fused=False)
    # it is stepped at the end of an epoch: the first of them begins at 0
    milestones = [epoch - 1 for epoch in _MILESTONES]
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, _GAMMA)
    losses, recalls = [], []
    for _ in range(_epochs(settings)):
        losses.append(textbook.train_epoch(student, step, loader, optimizer, settings.freeze_bn))
        scheduler.step()
        recalls.append(textbook.evaluate(student, evaluation, (1,))[1])
    return Student("plain", seed, recalls, losses, time.monotonic() - start)


def plain_student(settings: FidelitySettings, teacher: Path | None, seed: int) -> tuple[nn.Module, textbook.Step]:
    """The student that our run of this seed starts from, as plain layers, and the step that teaches it."""
    device = make_context(settings.device, "fp32").device
    torch.manual_seed(derive_seed(seed, "weights"))
    model = build_model(settings.base, settings.dimensions, l2normalize=teacher is None, weights=settings.weights)
    student = _plain(model).to(device)
    if teacher is None:
        return student, textbook.triplet_step(student, DistanceWeighted(published=True), 0.2)
    taught = load_model(teacher)
    return student, textbook.rkd_step(student, nn.Sequential(_Normalized(taught), _plain(taught)).to(device))


def _plain(model: EmbeddingNet) -> nn.Module:
    """Contiguous, nothing folded; images come normalized from the transforms."""
    unit = [textbook.UnitLength()] if model.l2normalize else []
    network = nn.Sequential(model.base, nn.Flatten(), model.linear, *unit)
    return network.to(memory_format=torch.contiguous_format)


class _Normalized(nn.Module):
    """Images as the students take them, normalized as ``model`` takes them."""

    scale: Tensor
    shift: Tensor

    def __init__(self, model: EmbeddingNet) -> None:
        super().__init__()
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (textbook.MEAN, textbook.STD))
        self.register_buffer("scale", std / model.std)
        self.register_buffer("shift", (mean - model.mean) / model.std)

    def forward(self, images: Tensor) -> Tensor:
        return images * self.scale + self.shift


def fidelity_text(result: Fidelity) -> str:
    """A line a seed, the means, the intervals of the differences."""
    pairs = list(zip(result.ours, result.plain, strict=True))
    rows = [(a.best, b.best, a.best - b.best, a.last, b.last, a.last - b.last) for a, b in pairs]
    means = [sum(column) / len(pairs) for column in zip(*rows, strict=True)]
    titles = "seed  best: ours   plain    diff.  last: ours   plain    diff."
    lines = [
        f"{name:>4}  {a:10.2f}  {b:6.2f}  {c:+7.2f}  {d:10.2f}  {e:6.2f}  {f:+7.2f}"
        for name, row in zip([*(a.seed for a, _ in pairs), "mean"], [*rows, means], strict=True)
        for a, b, c, d, e, f in [[100 * figure for figure in row]]
    ]
    has = "" if result.teacher is None else f"; the teacher has {percent(result.teacher)}"
    where = f"unseen Recall@1 in percent{has}"
    ends = [_interval("best epoch", result.best), _interval("last epoch", result.last)]
    return "\n".join([titles, *lines, where, *ends])


def _interval(what: str, interval: Interval) -> str:
    mean, low, high = (f"{100 * value:+.2f}" for value in (interval.mean, interval.low, interval.high))
    says = "excludes 0" if interval.excludes_zero else "holds 0"
    return f"{what}: ours minus plain {mean} points, 95 % interval {low} to {high}, which {says}"


def main() -> None:
    """Print a table or JSON of all students."""
    flags = "dataset data loss teacher_base base weights freeze_bn dimensions teacher batch num_image_per_class epochs"
    flags += " iter_per_epoch lr resize image_size"
    settings, as_json = asked(FidelitySettings, __doc__, (*flags.split(), "workers", "seeds", "jobs", "save_dir"))
    found = run_fidelity(settings, progress_lines)
    text = json.dumps({"machine": machine(settings), "fidelity": asdict(found)}, indent=2)
    if settings.out:
        write_text(settings.out, text + "\n")
    print(text if as_json else fidelity_text(found))


if __name__ == "__main__":
    main()
