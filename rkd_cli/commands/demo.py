"""``rkd demo``: train a teacher, and one student in five ways, on drawn images."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rkd_cli.commands.options import open_named, reading_as_trained
from rkd_cli.data import load_dataset
from rkd_cli.embedding.embedder import Embedded
from rkd_cli.events import Reporter
from rkd_cli.metrics import asymmetric_recall_at_k
from rkd_cli.models import load_model
from rkd_cli.models.checkpoint import read_header
from rkd_cli.runtime.context import make_context
from rkd_cli.settings import DemoSettings, DistillSettings, InferenceSettings, TeacherSettings
from rkd_cli.training.loop import train
from rkd_cli.training.open import build_run
from rkd_cli.training.run_directory import RunDirectory

# {directory: name of its network}; triplet and RKD students once with unit-length embeddings and once without
NETWORKS = {
    "teacher": "teacher",
    "student-triplet-unit": "triplet student",
    "student-triplet-free": "triplet student",
    "student-rkd-unit": "RKD student",
    "student-rkd-free": "RKD student",
    "student": "D3still student",
}


@dataclass(frozen=True)
class DemoRow:
    """A trained network and its recalls on the evaluation split at its best epoch, as fractions."""

    name: str
    parameters: int
    embedding_size: int
    l2normalize: bool
    recall: dict[int, float]
    in_teacher: dict[int, float] = field(default_factory=dict)  # recalls of its queries in the teacher's index


@dataclass(frozen=True)
class DemoResult:
    """The rows are in the order of ``NETWORKS``."""

    rows: tuple[DemoRow, ...]
    seconds: float
    directory: Path

    @property
    def gains(self) -> tuple[float, float]:
        """Gain in Recall@1 of the RKD student over the triplet student, with unit length and without."""
        _, *losses, _ = (row.recall[1] for row in self.rows)
        return losses[2] - losses[0], losses[3] - losses[1]


def run_demo(settings: DemoSettings, report: Reporter) -> DemoResult:
    """Train the networks of ``rkd demo`` in order, each in its own run directory."""
    start = time.monotonic()
    directories = {name: settings.save_dir / name for name in NETWORKS}
    for directory in directories.values():  # fail before the first training
        RunDirectory.find(directory, settings.overwrite, resume=False)
    for run in _settings(settings):
        train(build_run(run, report), report)
    *others, student = (_row(NETWORKS[name], path / "best.safetensors") for name, path in directories.items())
    rows = (*others, _in_teacher(student, directories, settings, report))
    return DemoResult(rows, time.monotonic() - start, settings.save_dir)


def _settings(settings: DemoSettings) -> list[TeacherSettings | DistillSettings]:
    """Settings of the runs, in order. All students have one network, schedule and number of batches."""
    common: dict[str, Any] = {
        "dataset": "demo", "data": settings.data, "resize": 54, "image_size": 48, "workers": settings.workers,
        "batch": 60, "iter_per_epoch": 20, "epochs": 10, "schedule": "cosine", "eval_every": 5, "eval_train": False,
        "seed": settings.seed, "device": settings.device, "weights": "none", "overwrite": settings.overwrite,
    }  # fmt: skip
    teacher = TeacherSettings(
        **common, base="resnet18", embedding_size=128, lr=5e-4, save_dir=settings.save_dir / "teacher"
    )
    common |= {"base": "shufflenet_v2_x1_0", "lr": 4e-3}
    taught = common | {"teacher": str(settings.save_dir / "teacher/best.safetensors"), "teacher_views": 8}
    runs: list[TeacherSettings | DistillSettings] = [teacher]
    for loss, model, flags in (("triplet", TeacherSettings, common), ("rkd", DistillSettings, taught)):
        for kind, unit in (("unit", True), ("free", False)):
            directory = settings.save_dir / f"student-{loss}-{kind}"
            runs.append(model(**flags, embedding_size=16, l2normalize=unit, save_dir=directory))
    space: dict[str, Any] = {"dist_ratio": 0.0, "angle_ratio": 0.0, "d3_ratio": 0.2, "queue_size": 2048}
    size, directory = teacher.embedding_size, settings.save_dir / "student"
    runs.append(DistillSettings(**taught, **space, embedding_size=size, l2normalize=True, save_dir=directory))
    return runs


def _row(name: str, path: Path) -> DemoRow:
    header = read_header(path)
    parameters = load_model(path).parameter_count()
    return DemoRow(name, parameters, header.embedding_size, header.l2normalize, header.eval_recall)


def _in_teacher(row: DemoRow, directories: dict[str, Path], settings: DemoSettings, report: Reporter) -> DemoRow:
    """The student's row with its recalls in the teacher's index."""
    asked = InferenceSettings(data=settings.data, workers=settings.workers, device=settings.device)
    context = make_context(asked.device, asked.precision)
    _, images = load_dataset("demo", settings.data, report)
    found: dict[str, Embedded] = {}
    for name in ("student", "teacher"):
        embedder = open_named(str(directories[name]), asked)
        what = f"Embedding with the {NETWORKS[name]}"
        how = reading_as_trained(embedder, asked, context.device)
        found |= {name: embedder.embed({what: images}, how, context, report)[what]}
    student, teacher = found["student"], found["teacher"]
    recall = asymmetric_recall_at_k(student.embeddings, teacher.embeddings, teacher.labels, sorted(row.recall))
    return replace(row, in_teacher=recall)
