"""The command that a training ends with, and a student that is as large as its teacher."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rkd_cli.events import Event, NetworkFacts, RunDone, RunStarted, SplitFacts
from rkd_cli.models import build_model
from rkd_cli.report.text import next_line
from rkd_cli.schemas import Result
from rkd_cli.settings import DistillSettings, TeacherSettings
from rkd_cli.settings.resolve import resolve
from rkd_cli.training.notes import flags_of_next, tell_of_size

FIGURES = {"eval": {"R@1": 0.5}}
RESULT = Result(selected_on="eval", best_epoch=3, best=FIGURES, final=FIGURES, seconds=61)
DONE = RunDone(RESULT, (Path("run/best.safetensors"),))
FACTS = NetworkFacts("resnet18", 11_242_176, 128, True)
STARTED = RunStarted(
    "train-teacher", "folder", (SplitFacts("train", 9, 3),), FACTS, None, (), None, "CPU", "fp32", "", Path("run"), 1, 1
)  # fmt: skip


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where no student is


def following(config: str | None, base: str = "", **flags: Any) -> tuple[str, DistillSettings]:
    """The next command after a teacher, and the settings that it has when it is typed."""
    teacher = resolve(TeacherSettings, ({"base": base} if base else {}) | flags, Path(config) if config else None)
    model = build_model(teacher.base, teacher.embedding_size, True)
    line = next_line(replace(STARTED, dataset=teacher.dataset, shared=flags_of_next(teacher, model)), DONE)
    words = shlex.split(line.removeprefix("next: rkd distill "))
    values = dict(zip(words[::2], words[1::2], strict=True))
    recipe = values.pop("--config", None)
    named = {name.removeprefix("--").replace("-", "_"): value for name, value in values.items()}
    return line, resolve(DistillSettings, named, Path(recipe) if recipe else None)


def test_after_the_quick_teacher_comes_the_quick_student() -> None:
    line, student = following("quick-teacher", data="my photos", weights="none", epochs="4", seed="2")
    assert line == "next: rkd distill --teacher run --config quick-student --data 'my photos' --weights none"
    assert (student.base, student.image_size) == ("mobilenet_v3_small", 160)
    assert (student.epochs, student.iter_per_epoch) == (12, 40)


def test_where_the_recipe_has_a_run_the_next_student_goes_elsewhere() -> None:
    Path("quick-student").mkdir()
    Path("quick-student/settings.json").touch()
    assert following("quick-teacher")[0].endswith("--config quick-student --save-dir quick-student-2")


def test_after_a_recipe_of_the_paper_comes_its_student() -> None:
    line, student = following("sop-teacher", data="sop")
    assert line == "next: rkd distill --teacher run --config sop-student-64 --data sop"
    assert (student.dataset, student.epochs, student.iter_per_epoch) == ("sop", 120, 500)
    assert following("cub200-teacher")[0] == "next: rkd distill --teacher run --dataset cub200"


def test_embeddings_that_are_there_are_not_in_the_way() -> None:
    Path("embeddings.npz").touch()
    of_photos = replace(DONE, result=RESULT.model_copy(update={"best": {"eval": {"overlap@10": 0.5}}}))
    run = replace(STARTED, command="distill", dataset="images", shared={"dataset": "images", "data": Path("p")})
    assert next_line(run, of_photos) == "next: rkd embed run --data p --out embeddings-2.npz"
    run = replace(run, dataset="cub200", shared={"dataset": "cub200"})
    assert next_line(run, of_photos) == "next: rkd embed run --dataset cub200 --out embeddings-2.npz"


@pytest.mark.parametrize(("base", "student"), [("resnet18", "mobilenet_v3_small"), ("resnet50", "resnet18"),
                                                ("shufflenet_v2_x0_5", "resnet18")])  # fmt: skip
def test_after_a_small_teacher_comes_a_smaller_student(base: str, student: str) -> None:
    assert following(None, base, dataset="folder")[1].base == student


@pytest.mark.parametrize(
    ("base", "size", "teacher", "advice"),
    [
        # next: after quick-teacher, before
        ("resnet18", 64, NetworkFacts("resnet18", 11_242_176, 128, True), ", such as mobilenet_v3_small,"),
        ("resnet18", 64, NetworkFacts("resnet34", 21_350_336, 128, True), None),
        ("resnet50", 64, NetworkFacts("resnet18", 11_242_176, 128, True), ", such as mobilenet_v3_small,"),
        ("resnet18", 128, NetworkFacts("resnet18", 11_242_176, 128, True), None),  # self-distillation
        ("resnet18", 64, NetworkFacts("embeddings", 0, 384, False), None),
        ("mobilenet_v3_small", 64, NetworkFacts("shufflenet_v2_x0_5", 407_360, 64, True), ""),
        ("mobilenet_v3_small", 4096, NetworkFacts("mobilenet_v2", 2_305_856, 64, True), ""),
        ("shufflenet_v2_x0_5", 64, NetworkFacts("timm:tiny", 300_000, 64, True), ""),
    ],
)
def test_a_student_as_large_as_its_teacher_is_told(
    base: str, size: int, teacher: NetworkFacts, advice: str | None
) -> None:
    settings = DistillSettings(teacher="t.safetensors", base=base, embedding_size=size)
    events: list[Event] = []
    tell_of_size(settings, build_model(base, size, False), teacher, events.append)
    assert len(events) == (advice is not None)
    for note in events:
        assert f"the student {base} has" in str(note)
        assert f"Choose a smaller --base{advice} unless that is intended." in str(note)
