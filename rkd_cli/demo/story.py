"""The whole story on a data set the program draws: a teacher, and one student trained in two ways."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rkd_cli.events import Reporter
from rkd_cli.models import load_model
from rkd_cli.models.checkpoint import read_header
from rkd_cli.settings import DemoSettings, DistillSettings, TeacherSettings
from rkd_cli.training.build import build_distill_run, build_teacher_run
from rkd_cli.training.loop import train
from rkd_cli.training.run_directory import RunDirectory


@dataclass(frozen=True)
class DemoRow:
    """A trained network and its recalls at its best epoch, as fractions."""

    name: str
    parameters: int
    embedding_size: int
    train_recall: dict[int, float]
    eval_recall: dict[int, float]


@dataclass(frozen=True)
class DemoResult:
    """Teacher, triplet student, RKD student."""

    rows: tuple[DemoRow, DemoRow, DemoRow]
    seconds: float
    student: Path  # the RKD student's best checkpoint

    @property
    def gain(self) -> float:
        """Unseen Recall@1 of the RKD student above the triplet student's."""
        return self.rows[2].eval_recall[1] - self.rows[1].eval_recall[1]


def run_demo(settings: DemoSettings, report: Reporter) -> DemoResult:
    """Train the three networks of ``rkd demo`` one after another, each a run directory of its own.

    Raises:
        RkdError: what the single commands raise.
    """
    start = time.monotonic()
    images = {"dataset": "demo", "data": settings.data, "resize": 64, "image_size": 56, "workers": settings.workers}
    schedule = {"batch": 60, "iter_per_epoch": 40, "epochs": 10, "lr_decay_epochs": (7, 9), "lr_decay_gamma": 0.3}
    run = {"seed": settings.seed, "device": settings.device, "weights": "none", "overwrite": settings.overwrite}
    common = images | schedule | run
    large: dict[str, Any] = common | {"base": "resnet18", "embedding_size": 128, "lr": 5e-4}
    small: dict[str, Any] = common | {"base": "shufflenet_v2_x1_0", "embedding_size": 16, "lr": 2e-3}
    teacher_dir, triplet_dir, rkd_dir = (settings.save_dir / name for name in ("teacher", "student-triplet", "student"))
    for directory in (teacher_dir, triplet_dir, rkd_dir):  # refuse before the first minute, not after the second
        RunDirectory.prepare(directory, "", {}, settings.overwrite, resume=False)

    teacher = TeacherSettings(**large, save_dir=teacher_dir)
    train(build_teacher_run(teacher, report), report)
    triplet = TeacherSettings(**small, save_dir=triplet_dir)
    train(build_teacher_run(triplet, report), report)
    rkd = DistillSettings(**small, teacher=str(teacher_dir / "best.safetensors"), save_dir=rkd_dir)
    train(build_distill_run(rkd, report), report)

    rows = (
        _row("teacher", teacher_dir),
        _row("triplet student", triplet_dir),
        _row("RKD student", rkd_dir),
    )
    return DemoResult(rows, time.monotonic() - start, rkd_dir / "best.safetensors")


def _row(name: str, directory: Path) -> DemoRow:
    path = directory / "best.safetensors"
    header = read_header(path)
    model = load_model(path)
    return DemoRow(name, model.parameter_count(), header.embedding_size, header.train_recall, header.eval_recall)
