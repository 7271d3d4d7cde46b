"""rkd report: what is measured of runs and teachers, what is shown of retrieval, and runs that lack something."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from rkd_cli.commands import demo, report
from rkd_cli.commands.compare import compare_runs
from rkd_cli.commands.demo import DemoResult, DemoRow
from rkd_cli.commands.report import Report, SetReport, measure_report
from rkd_cli.commands.runs import read_runs
from rkd_cli.data import load_dataset
from rkd_cli.data.decode import Box, Decoding, center_crop, load_crops
from rkd_cli.data.loader import EvalLoader
from rkd_cli.data.splits import ImageSet, relative_names, seen_classes
from rkd_cli.embedding import embedder
from rkd_cli.embedding.vectors import write_vectors
from rkd_cli.errors import DataError, SettingsError
from rkd_cli.events import Event, Note, Progress, silent
from rkd_cli.metrics import Protocol, recall_at_k
from rkd_cli.models import load_model
from rkd_cli.models.checkpoint import read_header, save_model
from rkd_cli.models.cost import Cost
from rkd_cli.report import projection
from rkd_cli.report.card import card_text
from rkd_cli.report.gallery import Gallery, find_confusions, find_galleries, find_near, recall_by_class, thumbnail
from rkd_cli.report.page import report_html
from rkd_cli.report.views import figures_table, styles_of
from rkd_cli.settings import DistillSettings, ReportSettings, TeacherSettings
from rkd_cli.settings.resolve import resolve
from rkd_cli.training.loop import train
from rkd_cli.training.open import build_run

Rkd = Callable[..., tuple[int, str, str]]
CLASSES = ("0", "1", "2", "3", "<b>bold", "new\nline", "q\" & 'a", "日本 é")  # the last four are unseen
LATENCY = {(1, 1): 4.0, (1, 32): 60.0, (2, 1): 3.0, (2, 32): 40.0}


@pytest.fixture(scope="module")
def trained(tiny_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photos/ and the runs teacher/, student/ (of that teacher) and other/ (with labels alone)."""
    root = tmp_path_factory.mktemp("trained")
    for name, folder in zip(CLASSES, sorted((tiny_set / "images").iterdir()), strict=True):
        shutil.copytree(folder, root / "photos" / name)
    flags: dict[str, Any] = {
        "dataset": "folder", "data": str(root / "photos"), "weights": "none", "base": "shufflenet_v2_x0_5",
        "embedding_size": "8", "resize": "36", "image_size": "32", "batch": "8", "num_image_per_class": "2",
        "iter_per_epoch": "1", "epochs": "2", "lr": "1e-3", "workers": "0", "device": "cpu", "cache": "none",
    }  # fmt: skip
    for name, loss in (("teacher", "proxy_anchor"), ("other", "softmax")):
        settings = resolve(TeacherSettings, flags | {"save_dir": str(root / name), "loss": loss})
        train(build_run(settings, silent), silent)
    teacher = {"teacher": str(root / "teacher/best.safetensors"), "save_dir": str(root / "student"), "seed": "2"}
    train(build_run(resolve(DistillSettings, flags | teacher), silent), silent)
    return root


@pytest.fixture
def root(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to be changed, and the working directory; the photos stay where the runs have them."""
    for name in ("teacher", "student", "other"):
        shutil.copytree(trained / name, tmp_path / name)
    file = tmp_path / "student/settings.json"
    settings = json.loads(file.read_text()) | {"teacher": str(tmp_path / "teacher/best.safetensors")}
    file.write_text(json.dumps(settings))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def _quick_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        report, "measure_cost", lambda network, side, file: Cost(network.parameter_count(), 100, 1, 32, LATENCY)
    )


def measured(*names: str, **flags: Any) -> tuple[Report, list[str]]:
    """The report, and the notes but those of networks that one epoch made no better."""
    events: list[Event] = []
    settings = resolve(ReportSettings, {"workers": "0", "device": "cpu", "gallery": "2"} | flags)
    found = measure_report([Path(name) for name in names], settings, events.append)
    notes = [event.text for event in events if isinstance(event, Note)]
    return found, [note for note in notes if "is from epoch 0, before training" not in note]


def only_set(found: Report) -> SetReport:
    (part,) = found.sets
    return part


def unseen(trained: Path) -> tuple[ImageSet, Tensor]:
    images = load_dataset("folder", trained / "photos")[1]
    return images, torch.tensor(images.labels)


def embedded(checkpoint: Path, images: ImageSet) -> Tensor:
    """By the network of a checkpoint alone, in the batches of its run: of others the last bits differ."""
    crops = [center_crop(index, 36, 32) for index in range(len(images))]
    pixels = load_crops(images.paths, crops, 36, 32)
    with torch.inference_mode():
        return torch.cat([load_model(checkpoint)(part) for part in torch.split(pixels, 8)])


def test_models_are_measured_beside_their_teacher(root: Path, trained: Path) -> None:
    found, notes = measured("student", "other")
    part = only_set(found)
    assert notes == []
    assert ([run.name for run in found.runs], [run.name for run in found.teachers]) == (
        ["student", "other"],
        ["teacher"],
    )
    assert [(model.name, model.is_teacher) for model in part.models] == [
        ("teacher", True), ("student", False), ("other", False),
    ]  # fmt: skip
    assert found.runs[0].teacher == "teacher"
    assert (part.images, part.classes, part.compared, part.main) == (24, 4, ("teacher", "student", "other"), 1)
    images, labels = unseen(trained)
    for model in part.models:
        expected = recall_at_k(embedded(root / model.name / "best.safetensors", images), labels, (1, 2, 4, 8))
        assert model.recall == pytest.approx(expected)
        assert model.run
        assert {f"R@{k}": r for k, r in model.recall.items()} == pytest.approx(dict(model.run.facts.figures))
        assert model.cost
        assert model.cost.file_bytes == (root / model.name / "best.safetensors").stat().st_size
        assert model.cost.latency == LATENCY
    assert [len(run.rows) for run in found.runs] == [3, 3]
    assert found.differing == ("loss", "l2normalize", "lr_decay_epochs", "lr_decay_gamma")
    assert part.map
    assert [len(drawn.points) for drawn in part.map.planes] == [24] * 3
    assert {*(part.map.labels or ())} == {*CLASSES[4:]}


def test_answers_are_the_nearest_and_those_of_the_class_are_right(root: Path, trained: Path) -> None:
    found, _ = measured("student", gallery="3")
    part = only_set(found)
    images, labels = unseen(trained)
    assert part.galleries[-1].title == "Drawn at random"
    assert len(part.galleries[-1].queries) == 3
    vectors = [embedded(root / name / "best.safetensors", images).double() for name in part.compared]
    for gallery in part.galleries:
        for query in gallery.queries:
            for x, answers in zip(vectors, query.answers, strict=True):
                distances = [float((x[query.image] - x[row]).norm()) for row in range(len(x))]
                order = sorted((row for row in range(len(x)) if row != query.image), key=distances.__getitem__)
                assert [answer.image for answer in answers] == order[:5]
                assert [answer.right for answer in answers] == [labels[row] == labels[query.image] for row in order[:5]]
    shown = [query.image for gallery in part.galleries for query in gallery.queries]
    assert len(shown) == len({*shown})
    query = part.galleries[0].queries[0]
    picture = part.pictures[query.image]
    assert picture.webp == thumbnail(images.paths[query.image])
    path = images.paths[query.image]
    assert (picture.name, picture.label) == (f"{path.parent.name}/{path.name}", images.classes[labels[query.image]])
    student = part.models[1]
    for number, name in enumerate(images.classes):  # Recall@1 of each class, counted one by one
        rows = [row for row, label in enumerate(labels) if label == number]
        apart = torch.cdist(vectors[1], vectors[1]).fill_diagonal_(torch.inf)
        hits = [labels[int(apart[row].argmin())] == number for row in rows]
        assert student.by_class[name] == pytest.approx(sum(hits) / len(rows))
    (whole,) = (one for one in student.variants if one.vectors == "float")
    assert (whole.size, whole.bytes, whole.recall[1]) == (8, 32, student.recall[1])
    assert {(one.vectors, one.bytes) for one in student.variants} >= {("int8", 8), ("binary", 1)}


def test_the_page_is_written_once_and_again_where_that_is_asked_for(root: Path, rkd: Rkd) -> None:
    common = ("--workers", "0", "--device", "cpu", "--gallery", "1")
    code, out, err = rkd("report", "student", "other", "--out", "a/r.html", *common)
    assert (code, err) == (1, "rkd: error: a/r.html: cannot be written (No such file or directory). The previous "
                              "file is unchanged.\n")  # fmt: skip
    code, out, err = rkd("report", "student", "other", "--out", "r.html", "--quiet", *common)
    assert (code, err) == (0, "")
    assert out == f"r.html: {Path('r.html').stat().st_size / 1e6:.1f} MB, open it in a browser\n"
    text = Path("r.html").read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>")
    assert text.rstrip().endswith("</html>")
    assert "<b>bold" not in text
    assert "&lt;b&gt;bold" in text
    assert not list(root.glob(".*.part"))
    code, _, err = rkd("report", "student", "--out", "r.html", *common)
    assert (code, err.count("\n")) == (2, 1)
    assert "--out r.html: already exists" in err
    assert Path("r.html").read_text(encoding="utf-8") == text
    code, out, _ = rkd("report", "student", "--out", "r.html", "--overwrite", *common)
    assert code == 0
    assert "Report on student" in Path("r.html").read_text(encoding="utf-8")
    code, _, err = rkd("report", "student", "--out", str(root), "--overwrite", *common)
    assert code == 2


def test_it_says_how_far_it_is(root: Path) -> None:
    events: list[Event] = []
    measure_report([Path("student")], resolve(ReportSettings, {"workers": "0", "device": "cpu"}), events.append)
    works = [event.what for event in events if isinstance(event, Progress) and event.done == event.total]
    assert works == [
        "Timing teacher", "Embedding with teacher", "Timing student", "Embedding with student", "Making thumbnails",
    ]  # fmt: skip


def test_networks_that_differ_by_their_weights_alone_are_timed_once(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[object] = []

    def timing(network: object, *_: object) -> Cost:
        timed.append(network)
        return Cost(1, 1, 1, 1, LATENCY)

    monkeypatch.setattr(report, "measure_cost", timing)
    found, _ = measured("other", "teacher", "student")  # the student's embeddings alone are not scaled
    assert len(timed) == 2
    sizes = [model.cost.file_bytes for model in only_set(found).models if model.cost]
    assert sizes == [(root / model.name / "best.safetensors").stat().st_size for model in only_set(found).models]


def test_classes_that_were_trained_on_and_untrained_networks_are_named(root: Path) -> None:
    path = root / "other/best.safetensors"
    data = json.loads((root / "other/settings.json").read_text())["data"]
    seen = seen_classes(load_dataset("folder", Path(data))[1])
    header = read_header(path).model_copy(update={"epoch": 0, "seen_classes": seen[:1]})
    save_model(path, load_model(path).state_dict(), header)
    found, _ = measured("other")
    assert only_set(found).notes == (
        f"other was trained on 1 of the evaluation classes ({CLASSES[4]}), so its recall is too high",
        "other is from epoch 0, before training: no epoch of its run was better",
    )


def test_a_killed_run_is_shown_with_what_there_is(root: Path) -> None:
    for name, rows in (("student", 2), ("other", 0)):
        (root / name / "result.json").unlink()
        lines = (root / name / "metrics.jsonl").read_text().splitlines(keepends=True)
        (root / name / "metrics.jsonl").write_text("".join(lines[:rows]))
    (root / "other/metrics.jsonl").unlink()
    (root / "other/best.safetensors").unlink()
    found, notes = measured("student", "other")
    assert [(run.facts.status, run.facts.reached, len(run.rows)) for run in found.runs] == [
        ("stopped", 1, 2), ("stopped", None, 0),
    ]  # fmt: skip
    assert notes == ["other: not measured: other/best.safetensors: does not exist (yet)"]
    part = only_set(found)
    assert notes[0] in part.notes
    assert [bool(model.recall) for model in part.models] == [True, True, False]
    assert part.compared == ("teacher", "student")
    assert found.runs[1].version is None


def test_a_run_that_is_going_on(root: Path) -> None:
    (root / "student/result.json").unlink()
    held = "from filelock import FileLock; a = FileLock('student/.lock'); a.acquire(); print(1, flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", held], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        process.stdout.readline()
        found, _ = measured("student")
        process.communicate("\n")
    assert found.runs[0].facts.status == "running"


def test_without_its_images_a_run_has_no_pictures(root: Path) -> None:
    file = root / "student/settings.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"data": "gone"}))
    found, notes = measured("student")
    part = only_set(found)
    (note,) = notes
    assert note.startswith("no model is measured on images, and no images are shown: gone: no such folder")
    assert (part.images, part.galleries, part.confusions, part.map) == (0, (), (), None)
    assert all(model.cost and not model.recall for model in part.models)


def test_other_images_than_those_of_the_run_are_noticed(root: Path, trained: Path) -> None:
    shutil.copytree(trained / "photos", root / "photos")
    for path in sorted((root / "photos" / CLASSES[5]).iterdir())[1:]:
        path.unlink()
    assert {note.partition(":")[0] for note in measured("student", data="photos")[1]} >= {"photos"}
    (root / "photos" / CLASSES[6] / "damaged.jpg").write_bytes(b"no image")
    _, notes = measured("student", data="photos")
    assert any("student: not measured" in note and "damaged.jpg" in note for note in notes)
    found, notes = measured("student", data="photos", skip_damaged=True)
    assert any("1 damaged images are left out" in note for note in notes)
    assert only_set(found).models[0].recall


def test_a_recall_that_is_not_that_of_the_run_is_noticed(root: Path) -> None:
    file = root / "student/result.json"
    result = json.loads(file.read_text())
    now = result["best"]["eval"]["R@1"]
    others = "the images or the way to embed them changed"
    rounding = "the order of nearly equal distances depends on the machine, its threads, the precision and the batch"
    for then, why in ((now, ""), (now - 0.004, rounding), (now - 0.006, others)):
        file.write_text(json.dumps(result | {"best": {"eval": {"R@1": then}}}))
        found, notes = measured("student")
        text = report_html(found)
        assert notes == [
            f"student: Recall@1 is {100 * now:.2f} here and was {100 * then:.2f} in its run: {why}"
        ] * bool(why)
        assert (f"({100 * then:.2f} in its run)" in text) == bool(why)


@pytest.mark.parametrize(("asked", "batch"), [({}, 8), ({"batch": "5"}, 5)])
def test_a_model_is_measured_in_the_batches_of_its_run(
    root: Path, asked: dict[str, str], batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []

    class Recording(EvalLoader):
        def __init__(self, images: ImageSet, batch: int, *others: Any, **more: Any) -> None:
            sizes.append(batch)
            super().__init__(images, batch, *others, **more)

    monkeypatch.setattr(embedder, "EvalLoader", Recording)
    measured("other", **asked)
    assert sizes == [batch]


def set_best_epoch(run: Path, epoch: int) -> None:
    """Whatever a training of two steps has made of it; 0: as if no epoch had been better than no training."""
    file = run / "result.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"best_epoch": epoch}))


def test_untrained_models_are_named_and_get_no_star(root: Path) -> None:
    for name, epoch in (("teacher", 1), ("student", 1), ("other", 0)):
        set_best_epoch(root / name, epoch)
    found, _ = measured("teacher", "student", "other")
    (part,) = found.sets
    table = figures_table(part, [run.name for run in found.runs], styles_of(found))
    rows = {row["title"]: dict(zip(table["columns"], row["cells"], strict=True)) for row in table["rows"]}
    assert {name: row["best epoch"]["text"] for name, row in rows.items()} == {
        "teacher": "1", "student": "1", "other": "0: untrained",
    }  # fmt: skip
    assert not any(cell["best"] for cell in rows["other"].values())
    for column in ("R@1", "MAP@R"):
        highest = max(float(rows[name][column]["text"]) for name in ("teacher", "student"))
        assert {n for n in rows if rows[n][column]["best"]} == {
            n for n in ("teacher", "student") if float(rows[n][column]["text"]) == highest
        }
    text = report_html(found)
    assert "other is untrained: no epoch was better than epoch 0." in text
    assert re.search(r"<dd>2 of 2, best 0: untrained</dd>", text)


@pytest.mark.parametrize("epoch", [0, 1])
def test_the_card_of_an_untrained_model_says_so(root: Path, epoch: int) -> None:
    set_best_epoch(Path("other"), epoch)
    (run,), _ = read_runs(compare_runs([Path("other")]), [Path("other")])
    assert ("**Untrained:**" in card_text(run, read_header(Path("other/best.safetensors")))) == (epoch == 0)


@pytest.mark.parametrize(
    ("names", "title", "counted"),
    [
        (("teacher",), "Report on teacher", "1 run, measured"),
        (("student",), "Report on student", "2 runs, measured"),  # and its teacher
        (("student", "other"), "Report on 3 runs", "3 runs, measured"),
    ],
)
def test_the_title_counts_the_runs_of_the_page(root: Path, names: tuple[str, ...], title: str, counted: str) -> None:
    text = report_html(measured(*names, gallery="0")[0])
    assert f"<title>{title}</title>" in text
    assert f"<h1>{title}</h1>" in text
    assert counted in text


def test_a_damaged_model_is_left_out_and_the_rest_is_there(root: Path) -> None:
    data = bytearray((root / "student/best.safetensors").read_bytes())
    data[-100] ^= 255
    (root / "student/best.safetensors").write_bytes(data)
    found, notes = measured("student", "other")
    assert notes == [
        "student: not measured: student/best.safetensors: damaged (wrong checksum). Download or create the file again."
    ]
    assert only_set(found).compared == ("other", "teacher")  # the teacher teaches nobody who is measured


@pytest.mark.parametrize("file", ["settings.json", "metrics.jsonl", "result.json"])
def test_a_damaged_run_is_one_line(root: Path, file: str, rkd: Rkd) -> None:
    (root / "student" / file).write_text("{")
    code, out, err = rkd("report", "student", "--workers", "0")
    assert (code, out) == (2, "")
    assert err.startswith(f"rkd: error: student/{file}: damaged, or of an incompatible version")
    assert err.count("\n") == 1
    assert not Path("report.html").exists()
    found, notes = measured("student", "other")
    assert [run.name for run in found.runs] == ["other"]
    assert len(found.problems) == 1
    assert notes == [f"left out: {found.problems[0]}"]


def test_what_is_no_run_is_said(root: Path, rkd: Rkd) -> None:
    assert rkd("report", "none", "--workers", "0") == (
        2, "", "rkd: error: none: not a run directory (no settings.json). Name run directories.\n",
    )  # fmt: skip


def test_a_teacher_that_is_gone_or_somewhere_else(root: Path) -> None:
    shutil.rmtree(root / "teacher")
    found, (note,) = measured("student")
    assert note.startswith("student: its teacher is left out: ")
    assert found.runs[0].teacher is None
    assert only_set(found).compared == ("student",)
    file = root / "student/settings.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"teacher": "torchvision:resnet18"}))
    assert measured("student")[1] == ["student: its teacher is left out: torchvision:resnet18 is a pretrained network"]


def test_a_teacher_that_is_named_too_is_one_model(root: Path) -> None:
    found, _ = measured("teacher", "student")
    assert (found.teachers, [run.name for run in found.runs]) == ((), ["teacher", "student"])
    assert [model.name for model in only_set(found).models] == ["teacher", "student"]
    assert only_set(found).compared == ("teacher", "student")


def test_a_file_of_embeddings_as_teacher(root: Path, trained: Path) -> None:
    images, labels = unseen(trained)
    vectors = np.random.default_rng(0).normal(size=(len(images), 5)).astype(np.float32)
    write_vectors(root / "vectors.npz", vectors, relative_names(images.paths, trained / "photos"))
    file = root / "student/settings.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"teacher": "vectors.npz"}))
    found, _ = measured("student")
    teacher = only_set(found).models[0]
    assert (teacher.name, teacher.run, teacher.cost, teacher.size) == ("vectors.npz", None, None, 5)
    assert teacher.recall == recall_at_k(torch.from_numpy(vectors), labels, (1, 2, 4, 8))
    assert only_set(found).compared == ("vectors.npz", "student")
    write_vectors(root / "vectors.npz", vectors[:9], relative_names(images.paths, trained / "photos")[:9])
    assert any("has embeddings of only 9 of 24 images" in note for note in measured("student")[1])


@pytest.mark.parametrize(("kind", "bytes_each"), [("float16", 10), ("int8", 5)])
def test_a_file_of_smaller_vectors_as_teacher(root: Path, trained: Path, kind: str, bytes_each: int) -> None:
    images, _ = unseen(trained)
    vectors = np.random.default_rng(0).normal(size=(len(images), 5)).astype(np.float32)
    write_vectors(root / "vectors.npz", vectors, relative_names(images.paths, trained / "photos"), None, kind)
    file = root / "student/settings.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"teacher": "vectors.npz"}))
    found, _ = measured("student")
    teacher = only_set(found).models[0]
    whole = teacher.variants[0]
    assert (whole.vectors, whole.bytes, whole.recall[1]) == (kind, bytes_each, teacher.recall[1])
    assert "float" not in {one.vectors for one in teacher.variants}
    assert f"5-d {kind}: " in report_html(found)


def test_photos_without_classes(root: Path, trained: Path) -> None:
    file = root / "student/settings.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"dataset": "images"}))
    found, _ = measured("student")
    part = only_set(found)
    assert part.classes == 0
    assert part.images >= 20
    assert part.confusions == ()
    assert part.map
    assert part.map.labels is None
    teachers = {answer.right for g in part.galleries for query in g.queries for answer in query.answers[0]}
    students = {answer.right for g in part.galleries for query in g.queries for answer in query.answers[1]}
    assert teachers == {None}
    assert students == {True, False}
    for query in (query for gallery in part.galleries for query in gallery.queries):
        of_teacher = {answer.image for answer in query.answers[0]}
        assert all(answer.right == (answer.image in of_teacher) for answer in query.answers[1])


def test_runs_of_two_sets_have_a_part_each(root: Path, trained: Path) -> None:
    shutil.copytree(trained / "photos", root / "photos")
    file = root / "other/settings.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"data": "photos"}))
    found, _ = measured("student", "other")
    assert [part.title for part in found.sets] == [f"folder, {trained / 'photos'}", "folder, photos"]
    assert [[model.name for model in part.models] for part in found.sets] == [["teacher", "student"], ["other"]]
    with pytest.raises(SettingsError, match="the runs use 2 data sets"):
        measured("student", "other", data="photos")


def test_five_models_are_four_side_by_side(root: Path) -> None:
    for name in ("b", "c"):
        file = shutil.copytree(root / "other", root / name) / "settings.json"
        changed = {"lr": {"b": 0.5, "c": 0.25}[name]}  # only seeds and folds may differ in an entry
        file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    found, (note,) = measured("student", "other", "b", "c")
    assert only_set(found).compared == ("teacher", "student", "other", "b")
    assert note == "pictures and maps show 4 of the 5 models: teacher, student, other, b"
    assert len(only_set(found).models) == 5


def test_of_runs_that_differ_by_seed_one_is_shown(root: Path) -> None:
    shutil.copytree(root / "other", root / "again")
    found, _ = measured("other", "again")
    assert only_set(found).compared == ("other",)
    assert [model.name for model in only_set(found).models] == ["other", "again"]


def test_an_exported_file_alone_is_refused(root: Path) -> None:
    with pytest.raises(DataError, match=r"small\.onnx: name the directory of its run too"):
        measured("small.onnx")


def test_pictures_show_boxes_and_answers_come_from_the_gallery(tmp_path: Path) -> None:
    image = Image.new("RGB", (80, 40), "red")
    image.paste("blue", (40, 0, 80, 40))
    image.save(tmp_path / "a.png")
    path = tmp_path / "a.png"
    for boxes, size in (({}, (80, 40)), ({path: Box(40, 0, 60, 40, 1)}, (20, 40))):
        data = thumbnail(path, decoding=Decoding(boxes=boxes))
        assert data
        with Image.open(io.BytesIO(data)) as shown:
            assert shown.size == size
            red, _, blue = shown.convert("RGB").getpixel((3, 3))  # type: ignore[misc]
        assert (blue > red) == bool(boxes)
    rows = torch.arange(8.0)[:, None]
    protocol = Protocol(torch.tensor([0, 1]), torch.tensor([1, 3, 4, 5, 6, 7]))
    space = find_near("x", rows, protocol)
    assert space.near[:2].tolist() == [[1, 3, 4, 5, 6], [3, 4, 5, 6, 7]]  # without itself
    labels = torch.tensor([0, 1, 1, 1, 1, 1, 1, 1])
    assert recall_by_class(space, labels, protocol.queries) == {0: 0.0, 1: 1.0}
    galleries = find_galleries([space], 0, None, None, labels, 5, 1, {0, 1})
    assert {query.image for gallery in galleries for query in gallery.queries} == {0, 1}


def test_the_seed_draws_and_zero_queries_are_no_gallery(root: Path) -> None:
    def drawn(seed: str) -> list[int]:
        galleries = only_set(measured("student", seed=seed)[0]).galleries
        return [query.image for query in galleries[-1].queries]

    assert drawn("1") == drawn("1")
    assert len({tuple(drawn(seed)) for seed in "12345"}) > 1
    part = only_set(measured("student", gallery="0")[0])
    assert part.galleries == ()
    assert part.confusions
    assert part.map


def test_a_cost_is_measured(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.chdir(root)
    found, _ = measured("other")
    cost = only_set(found).models[0].cost
    assert cost
    (run,) = compare_runs([Path("other")]).groups[0].runs
    assert (cost.parameters, cost.vector_bytes) == (run.parameters, 32)
    assert cost.latency.keys() == LATENCY.keys()
    assert all(time > 0 for time in cost.latency.values())
    assert cost.flops > 1e5


def line() -> tuple[Tensor, Tensor]:
    """Eight points of two classes on a line: where each has its nearest of either class is told by eye."""
    x = torch.tensor([0.0, 1.0, 2.0, 9.0, 10.0, 11.5, 14.0, 2.2])
    return x[:, None], torch.tensor([0, 0, 0, 1, 1, 1, 1, 1])


def titles(galleries: list[Gallery]) -> dict[str, list[int]]:
    return {gallery.title: [query.image for query in gallery.queries] for gallery in galleries}


def test_hard_and_easy_queries_are_those_by_margin() -> None:
    x, labels = line()
    margins = {}
    for row in range(len(x)):
        far = {bool(labels[o] == labels[row]): [] for o in range(len(x))}  # type: dict[bool, list[float]]
        for other in range(len(x)):
            if other != row:
                far[bool(labels[other] == labels[row])].append(abs(float(x[other] - x[row])))
        margins[row] = min(far[False]) - min(far[True])
    order = sorted(margins, key=margins.__getitem__)
    assert order[0] == 7  # it lies among the others
    found = titles(find_galleries([find_near("a", x)], 0, None, None, labels, 2, 1))
    assert found["The hardest"] == [7, next(row for row in order if labels[row] == 0)]  # another class comes second
    easiest = [row for row in reversed(order) if row not in found["The hardest"]]
    assert found["The easiest"] == [easiest[0], next(r for r in easiest if labels[r] != labels[easiest[0]])]
    assert [*found] == ["The hardest", "The easiest", "Drawn at random"]


def test_queries_that_two_models_answer_otherwise() -> None:
    _, labels = line()
    good = torch.tensor([0.0, 1.0, 2.0, 20.0, 21.0, 22.0, 23.0, 24.0])[:, None]
    bad = good.clone()
    bad[1], bad[4] = 20.1, 0.1  # each among the other class
    spaces = [find_near("good", good), find_near("bad", bad)]
    found = titles(find_galleries(spaces, 1, 0, 0, labels, 1, 1))
    assert {*found} >= {"Right by good, wrong by bad"}
    assert "Right by bad, wrong by good" not in found
    whole = titles(find_galleries(spaces, 1, 0, 0, labels, 8, 1))
    assert len([row for rows in whole.values() for row in rows]) == 8  # each once, whatever is asked for
    wrong = [row for row in range(8) if labels[spaces[1].near[row, 0]] != labels[row]]
    lost = titles(find_galleries(spaces, 1, 0, 0, labels, 3, 1))["Right by good, wrong by bad"]
    assert lost
    assert {*lost} <= {*wrong}
    other = titles(find_galleries(spaces[::-1], 1, 0, 0, labels, 1, 1))
    assert {*other} >= {"Right by good, wrong by bad"}


def test_classes_without_a_pair_or_of_one_kind_alone() -> None:
    x = torch.arange(6.0)[:, None]
    for labels in (torch.arange(6), torch.zeros(6, dtype=torch.long)):
        spaces = [find_near("a", x), find_near("b", x.flip(0))]
        assert [*titles(find_galleries(spaces, 1, 0, 0, labels, 2, 1))] == ["Drawn at random"]
    same = [find_near("a", torch.zeros(6, 2)), find_near("b", torch.zeros(6, 2))]
    assert titles(find_galleries(same, 1, 0, 0, torch.arange(6) % 2, 2, 1))["The hardest"]
    two = find_near("a", torch.tensor([[0.0], [1.0]]))
    assert two.near.tolist() == [[1], [0]]


def test_confused_pairs_are_counted() -> None:
    torch.manual_seed(3)
    labels = torch.arange(40) % 4
    images = ImageSet(tuple(Path(f"{row}.jpg") for row in range(40)), tuple(labels.tolist()), ("a", "b", "c", "d"))
    spaces = [find_near(name, torch.randn(40, 3)) for name in "xy"]
    counts = []
    for space in spaces:
        pairs: Counter[tuple[str, str]] = Counter()
        for row in range(40):
            distances = (space.embeddings - space.embeddings[row]).norm(dim=1)
            distances[row] = torch.inf
            pairs[images.classes[labels[row]], images.classes[labels[distances.argmin()]]] += 1
        counts.append(pairs)
    found = find_confusions(spaces, 1, images, labels)
    assert [pair.counts[1] for pair in found] == sorted((pair.counts[1] for pair in found), reverse=True)
    assert len(found) == min(10, len([pair for pair in counts[1] if pair[0] != pair[1]]))
    for pair in found:
        assert pair.counts == tuple(count[pair.of, pair.taken_for] for count in counts)
        assert pair.queries == 10
        assert pair.of != pair.taken_for
        assert (images.classes[labels[pair.query]], images.classes[labels[pair.answer]]) == (pair.of, pair.taken_for)
        assert spaces[1].near[pair.query, 0] == pair.answer


def test_principal_components_and_their_turn() -> None:
    torch.manual_seed(0)
    flat = torch.randn(50, 2) @ torch.diag(torch.tensor([5.0, 1.0]))
    x = torch.cat([flat, torch.zeros(50, 3)], dim=1)
    q, _ = torch.linalg.qr(torch.randn(5, 5))
    first, second = projection.project("pca", [("a", x), ("b", 7 * x @ q + 3)], 1)
    assert first.variance == pytest.approx(1)
    a, b = torch.tensor(first.points), torch.tensor(second.points)
    assert torch.allclose(a, b, atol=1e-4)  # one is the other, turned, mirrored, scaled and moved
    assert float(a.abs().max()) == pytest.approx(1)
    scale = torch.cdist(a, a)[0, 1] / torch.cdist(flat, flat)[0, 1]
    assert torch.allclose(torch.cdist(a, a), scale * torch.cdist(flat, flat), atol=1e-3)  # nothing is lost of a plane
    (one,) = projection.project("pca", [("a", torch.ones(4, 3))], 1)
    assert (one.points, one.variance) == (((0.0, 0.0),) * 4, None)
    (thin,) = projection.project("pca", [("a", torch.arange(4.0)[:, None])], 1)
    assert [y for _, y in thin.points] == [0.0] * 4


def test_a_map_shows_so_many_classes_and_points() -> None:
    labels = torch.arange(100).repeat(60)
    rows = projection.draw_points(labels, 6000, 1)
    assert (len(rows), rows) == (1500, sorted(rows))
    assert len({*labels[rows].tolist()}) == 48
    assert projection.draw_points(labels, 6000, 1) == rows != projection.draw_points(labels, 6000, 2)
    assert projection.draw_points(None, 7, 1) == [*range(7)]


@pytest.mark.parametrize(
    ("kind", "module", "package"), [("tsne", "sklearn", "scikit-learn"), ("umap", "umap", "umap-learn")]
)
def test_a_map_whose_library_is_missing_is_refused_first(
    root: Path, rkd: Rkd, monkeypatch: pytest.MonkeyPatch, kind: str, module: str, package: str
) -> None:
    monkeypatch.setattr(projection, "find_spec", lambda name: None if name == module else object())
    says = f"--map {kind}: {package} is not installed. Run `pip install {package}`, or use --map pca."
    assert rkd("report", "student", "--map", kind) == (2, "", f"rkd: error: {says}\n")


@pytest.fixture
def umap(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """A module in the place of umap-learn, and what it is asked for."""
    asked: list[dict[str, Any]] = []

    class UMAP:
        def __init__(self, **settings: Any) -> None:
            asked.append(settings)

        def fit_transform(self, x: np.ndarray) -> np.ndarray:
            return np.asarray(x[:, :2] * [1, -1], np.float32)

    monkeypatch.setitem(sys.modules, "umap", types.SimpleNamespace(UMAP=UMAP, __spec__=object()))
    yield asked


def test_umap_is_asked_with_the_seed(root: Path, umap: list[dict[str, Any]]) -> None:
    found, _ = measured("student", map="umap", seed="7")
    assert umap == [{"n_neighbors": 15, "random_state": 7}] * 2
    drawn = only_set(found).map
    assert drawn
    assert (drawn.kind, [p.variance for p in drawn.planes]) == ("umap", [None, None])


def test_tsne_of_few_points_and_of_the_same_seed() -> None:
    pytest.importorskip("sklearn")
    for x in (torch.randn(12, 4), torch.randn(12, 1)):
        (a,), (b,) = (projection.project("tsne", [("a", x)], 3) for _ in range(2))
        assert a == b
        assert len(a.points) == 12


def test_a_picture_that_cannot_be_read_has_none(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"nothing")
    assert thumbnail(tmp_path / "a.jpg") is None
    assert thumbnail(tmp_path / "b.jpg") is None


def test_the_demo_ends_with_a_report(root: Path, rkd: Rkd, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in demo.NETWORKS.keys() - {"teacher", "student"}:
        shutil.copytree(root / "other", root / place)
    rows = tuple(DemoRow(name, 1_000_000, 8, True, {1: 0.5}) for name in demo.NETWORKS.values())
    result = DemoResult(rows, 60.0, root)
    monkeypatch.setattr(demo, "run_demo", lambda settings, report: result)
    code, out, _ = rkd("demo", "--save-dir", root, "--workers", "0", "--device", "cpu", "--quiet")
    assert code == 0
    assert f"Report for a browser: {root / 'report.html'}" in out.replace("\n", "")
    text = (root / "report.html").read_text(encoding="utf-8")
    assert "Report on 6 runs" in text
    assert "Student against teacher" in text


def test_no_run_can_be_read(root: Path) -> None:
    with pytest.raises(DataError, match=r"^none: not a run directory"):
        measured("none")


def test_a_gallery_of_one_image_has_no_pictures_of_answers(trained: Path, root: Path) -> None:
    """Where it is the only one that queries may find, it has itself no image to find."""
    photos = {name: sorted((trained / "photos" / name).iterdir()) for name in CLASSES}
    lines = [f'"{path}",{name},train,' for name in CLASSES[:4] for path in photos[name]]
    first, *others = photos[CLASSES[7]]
    lines += [f'"{first}",7,eval,gallery', *(f'"{path}",7,eval,query' for path in others)]
    (root / "list.csv").write_text("\n".join(["path,label,split,role", *lines]) + "\n")
    for file in root.glob("*/settings.json"):
        settings = json.loads(file.read_text()) | {"dataset": "list", "data": str(root / "list.csv")}
        file.write_text(json.dumps(settings))
    found, _ = measured("student")
    part = only_set(found)
    assert [model.recall[1] for model in part.models] == [1.0, 1.0]
    assert (part.galleries, part.map) == ((), None)
