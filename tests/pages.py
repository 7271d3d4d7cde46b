"""Reports made by hand, for the tests of what is drawn."""

from __future__ import annotations

import io
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from PIL import Image

from rkd_cli.commands.compare import RunFacts
from rkd_cli.commands.report import Map, Model, Picture, Report, SetReport
from rkd_cli.commands.runs import Run
from rkd_cli.commands.variants import Variant
from rkd_cli.models.cost import Cost
from rkd_cli.report.gallery import Answer, Confusion, Gallery, Query
from rkd_cli.report.projection import Plane
from rkd_cli.schemas import EpochDone

ODD = "<b>\"x\" & 'y'</b>\n{{ 7 * 7 }} 日本 </title><script>alert(1)</script>"  # of a class, a path, a run
MADE = datetime(2026, 11, 25, 7, 30, tzinfo=UTC)


def webp(color: str) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (112, 112), color).save(data, "WEBP")
    return data.getvalue()


def make_run(name: str, recall: float | None = 0.5, teacher: str | None = None, **facts: Any) -> Run:
    """A run of two epochs, done; without a recall none of its epochs is there."""
    settings: dict[str, Any] = {
        "command": "train-teacher", "dataset": "folder", "data": "photos", "base": "resnet18", "embedding_size": 64,
        "l2normalize": True, "seed": 1,
    }  # fmt: skip
    loss = "proxy_anchor"
    if teacher:
        settings |= {"command": "distill", "dist_ratio": 1.0, "teacher": teacher}
        loss = "1 dist + 2 angle"
    figures = {} if recall is None else {"R@1": recall, "R@2": recall + 0.1}
    shown: dict[str, Any] = {"data": "folder photos", "network": "resnet18 64-d", "loss": loss}
    shown |= {"teacher": teacher} if teacher else {}
    of = RunFacts(
        Path("runs") / name, "done", shown, name, 1, 2, None if recall is None else 2, None if recall is None else 2,
        figures, recall, 11_200_000, 45_000_000, 61.0,
    )  # fmt: skip
    rows = () if recall is None else tuple(_row(epoch, recall, bool(teacher)) for epoch in range(3))
    return Run(name, replace(of, **facts), settings, rows, MADE, "0.1.0", teacher)


def _row(epoch: int, recall: float, student: bool) -> EpochDone:
    reached = recall * (1 + epoch) / 3
    losses = {"dist": 0.4, "angle": 0.2} if student else {"proxy_anchor": 12.0}
    return EpochDone(
        epoch=epoch, losses={term: value / epoch for term, value in losses.items()} if epoch else {}, seconds=30,
        is_best=True, figures={"train": {"R@1": reached}, "eval": {"R@1": reached, "R@2": reached + 0.1}},
    )  # fmt: skip


def make_model(run: Run, is_teacher: bool, share: float) -> Model:
    latency = {(threads, batch): 10.0 * share * batch / threads for threads in (1, 2) for batch in (1, 32)}
    cost = Cost(int(10e6 * share), int(4e9 * share), int(40e6 * share), 256, latency)
    recall = {1: run.facts.figures["R@1"], 2: run.facts.figures["R@2"]}
    variants = tuple(
        Variant(None, size, what, size * bits // 8, {1: recall[1] - lost})
        for size, what, bits, lost in ((64, "float", 32, 0.0), (16, "float", 32, 0.1), (64, "int8", 8, 0.005))
    )
    by_class = {"class 1": recall[1] / 2, "class 2": recall[1]}
    return Model(
        run.name, is_teacher, run, "resnet18", 64, recall, 0.3, 0.2, cost, variants=variants, by_class=by_class
    )


def make_report(student: str = "student", label: str = "Owl", classes: int = 3) -> Report:
    """A teacher and two students of it, with everything there is."""
    teacher = make_run("teacher", 0.8)
    runs = (make_run(student, 0.6, "teacher"), make_run("other", 0.4, "teacher"))
    models = (make_model(teacher, True, 1.0), make_model(runs[0], False, 0.1), make_model(runs[1], False, 0.2))
    names = [label, *(f"class {number}" for number in range(1, classes))]
    pictures = {
        number: Picture(webp(color), f"{label}.jpg", label if number < 2 else "class 1")
        for number, color in enumerate(("teal", "gold", "olive", "navy"))
    }
    answers = (Answer(1, True), Answer(2, False), Answer(3, False))
    query = Query(0, (answers, answers[::-1], answers))
    points = tuple((number / classes - 0.5, 0.5 - number / classes) for number in range(2 * classes))
    labels = tuple(names[number % classes] for number in range(2 * classes))
    part = SetReport(
        title="folder, photos", images=2 * classes, classes=classes, models=models,
        compared=tuple(model.name for model in models), main=1,
        galleries=tuple(Gallery(title, f"why {student}", (query,)) for title in ("The hardest", "Drawn at random")),
        confusions=(Confusion(label, "class 1", (1, 2, 0), 4, 0, 2),),
        pictures=pictures,
        class_sizes={"class 1": 7, "class 2": 1200},
        map=Map("pca", tuple(Plane(model.name, points, 0.39) for model in models), labels),
        notes=("a note",),
    )  # fmt: skip
    return Report(runs, (teacher,), (part,), ("loss",), ("runs/bad: a problem",), "a machine", MADE, 1)
