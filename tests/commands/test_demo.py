"""rkd demo: students are compared like with like, and one of them in the teacher's index."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rkd_cli.commands import demo
from rkd_cli.data.decode import center_crop, load_crops
from rkd_cli.data.sets.cub200 import load_listed
from rkd_cli.events import silent
from rkd_cli.metrics import recall_at_k
from rkd_cli.models import build_model
from rkd_cli.models.checkpoint import save_model
from rkd_cli.models.embedding_net import header_of
from rkd_cli.settings import DemoSettings, DistillSettings, TeacherSettings


def test_students_of_one_kind_differ_by_their_loss_alone() -> None:
    teacher, *students = demo._settings(DemoSettings())
    assert [run.save_dir.name for run in (teacher, *students)] == [*demo.NETWORKS]
    kinds = {run.save_dir.name: run for run in students}
    assert isinstance(teacher, TeacherSettings)
    for kind, unit in (("unit", True), ("free", False)):
        labels, relations = (kinds[f"student-{loss}-{kind}"] for loss in ("triplet", "rkd"))
        assert isinstance(labels, TeacherSettings)
        assert isinstance(relations, DistillSettings)
        assert (labels.l2normalize, relations.l2normalize) == (unit, unit)
        shared = TeacherSettings.model_fields.keys() & DistillSettings.model_fields.keys() - {"save_dir"}
        used = {name: getattr(labels, name) for name in shared if "decay_epochs" not in name and "gamma" not in name}
        assert used == {name: getattr(relations, name) for name in used}
        assert relations.triplet_ratio == 0
    student = kinds["student"]
    assert isinstance(student, DistillSettings)
    assert (student.embedding_size, student.l2normalize) == (teacher.embedding_size, True)
    assert [name for name in DistillSettings.model_fields if name.endswith("_ratio") and getattr(student, name)] == [
        "d3_ratio"
    ]


def test_the_student_queries_the_index_of_its_teacher(
    tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    splits = load_listed(tiny_set, "")
    monkeypatch.setattr(demo, "load_dataset", lambda *_: splits)
    model = build_model("shufflenet_v2_x0_5", 8, True)
    places = {name: tmp_path / name for name in ("student", "teacher")}
    for place in places.values():  # one network: what it finds in the other's index is what it finds in its own
        place.mkdir()
        header = header_of(model, "shufflenet_v2_x0_5", 36, 32, "cub200").model_copy(update={"epoch": 1})
        save_model(place / "best.safetensors", model.state_dict(), header)
    row = demo.DemoRow("student", 1, 8, True, {1: 0.0, 2: 0.0})
    settings = DemoSettings(workers=0, device="cpu")
    found = demo._in_teacher(row, places, settings, silent).in_teacher
    images = splits[1]
    with torch.inference_mode():
        x = model.eval()(load_crops(images.paths, [center_crop(i, 36, 32) for i in range(len(images))], 36, 32))
    assert found == pytest.approx(recall_at_k(x, torch.tensor(images.labels), (1, 2)))
