"""Distillation of photos without labels: what is measured, what picks the best epoch, what files and screens hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rkd_cli.cli import main
from rkd_cli.data import ImageSet, UniformBatchSampler, load_dataset
from rkd_cli.data.decode import center_crop, load_crops
from rkd_cli.data.splits import relative_names, seen_classes
from rkd_cli.embedding.vectors import write_vectors
from rkd_cli.errors import DataError, SettingsError
from rkd_cli.events import Event, Note, RunStarted, SplitFacts, TeacherEvaluated, silent
from rkd_cli.metrics import agreement
from rkd_cli.models import build_model, load_model
from rkd_cli.models.checkpoint import read_header, save_model
from rkd_cli.models.embedding_net import header_of
from rkd_cli.schemas import MAX_PIXELS, OWN_FIT, EpochDone
from rkd_cli.settings import DistillSettings, TeacherSettings
from rkd_cli.settings.resolve import resolve
from rkd_cli.training.loop import Run, train
from rkd_cli.training.open import build_run
from rkd_cli.training.teachers import LiveTeacher

Flags = dict[str, str | bool]


@pytest.fixture
def flags(quick: Flags, tiny_set: Path, tmp_path: Path) -> Flags:
    """Of a student of 60 photos in one folder; its teacher has its size, and weights as they were drawn."""
    (tmp_path / "photos").mkdir()
    for number, path in enumerate([*sorted(tiny_set.rglob("*.jpg")), *sorted(tiny_set.rglob("*.jpg"))[:12]]):
        photo = tmp_path / f"photos/{number:02}.jpg"
        photo.write_bytes(path.read_bytes() + bytes([number]))  # of those that come twice, no copies
    (tmp_path / "teacher").mkdir()
    teacher: Flags = {"teacher": str(tmp_path / "teacher/t.safetensors")}
    model = build_model("timm:test_resnet", 8, True)
    header = header_of(model, "timm:test_resnet", 36, 32, "folder", "eval", ())
    header = header.model_copy(update={"epoch": 3, "fit": OWN_FIT})
    save_model(Path(str(teacher["teacher"])), model.state_dict(), header)
    rest = {name: value for name, value in quick.items() if name not in ("sample", "num_image_per_class")}
    more: Flags = {
        "dataset": "images",
        "data": str(tmp_path / "photos"),
        "epochs": "2",
        "batch": "16",
        "keep_state": True,
    }
    return rest | teacher | more


def build(flags: Flags, events: list[Event] | None = None, **more: str | bool) -> Run:
    return build_run(resolve(DistillSettings, flags | more), silent if events is None else events.append)


def embedded(path: Path, images: ImageSet) -> Tensor:
    """By the network of a checkpoint alone."""
    crops = [center_crop(index, 36, 32) for index in range(len(images))]
    with torch.inference_mode():
        return load_model(path)(load_crops(images.paths, crops, 36, 32))


def read(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return rows, json.loads((path / "result.json").read_text())


@pytest.mark.parametrize("select_on", ["eval", "val"])
def test_the_figures_are_the_agreement_with_the_teacher(flags: Flags, tmp_path: Path, select_on: str) -> None:
    events: list[Event] = []
    run = build(flags, select_on=select_on, lr="1e-2")
    done = train(run, events.append)
    rows, result = read(tmp_path / "run")
    splits = {name: loader.images for name, loader in run.evaluation.items()}
    assert {name: len(images) for name, images in splits.items()} == (
        {"train": 20, "eval": 20, "val": 20} if select_on == "val" else {"train": 40, "eval": 20}
    )
    for name, images in splits.items():
        found = agreement(
            embedded(tmp_path / "run/last.safetensors", images), embedded(Path(str(flags["teacher"])), images)
        )
        assert rows[-1]["figures"][name] == pytest.approx(found, abs=0.03)  # a batch of another size rounds otherwise
        assert set(found) == {"overlap@10", "asymmetric@1", "asymmetric@10"}
    assert not any("R@1" in found for row in rows for found in row["figures"].values())
    scores = [row["figures"][select_on]["overlap@10"] for row in rows]
    best = scores.index(max(scores))
    assert [row["is_best"] for row in rows] == [score > max(scores[:n], default=-1) for n, score in enumerate(scores)]
    assert (result["selected_on"], result["best_epoch"]) == (select_on, best)
    assert result["best"] == rows[best]["figures"] == done.result.best
    assert result["final"] == rows[-1]["figures"]
    train_scores = [row["figures"]["train"] for row in rows]
    assert result["best_train"] == max(train_scores, key=lambda found: found["overlap@10"])
    shown = [event for event in events if isinstance(event, EpochDone)]
    assert [event.figures for event in shown] == [row["figures"] for row in rows]
    assert not any(isinstance(event, TeacherEvaluated) for event in events)
    assert read_header(tmp_path / "run/best.safetensors").epoch == best


def test_the_teacher_embeds_what_is_measured_once(flags: Flags, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    real = LiveTeacher.embed

    def count(self: LiveTeacher, images: ImageSet, *rest: Any) -> tuple[Tensor, Tensor]:
        calls.append(images.name)
        return real(self, images, *rest)

    monkeypatch.setattr(LiveTeacher, "embed", count)
    train(build(flags, epochs="3"), silent)
    assert calls == ["train", "eval"]
    train(build({"save_dir": flags["save_dir"], "resume": True}), silent)  # nothing is left to do
    assert calls == ["train", "eval"]
    train(build({"save_dir": flags["save_dir"], "resume": True, "epochs": "4"}), silent)
    assert calls == ["train", "eval"] * 2
    calls.clear()
    train(build(flags, eval_train=False, overwrite=True), silent)
    assert calls == ["eval"]


def test_another_size_has_no_asymmetric_figures_and_unmeasured_epochs_none(flags: Flags, tmp_path: Path) -> None:
    train(build(flags, embedding_size="6", eval_every="2", eval_train=False, epochs="3"), silent)
    rows, result = read(tmp_path / "run")
    assert [row["figures"].get("eval", {}).keys() for row in rows] == [
        {"overlap@10"},
        set(),
        {"overlap@10"},
        {"overlap@10"},
    ]
    assert not any("train" in row["figures"] for row in rows)
    assert result["best_train"] == {} and result["best"]["eval"].keys() == {"overlap@10"}


def test_the_header_says_photos_and_how_few(flags: Flags) -> None:
    events: list[Event] = []
    run = build(flags, events, select_on="val")
    facts = (SplitFacts("train", 20, 0), SplitFacts("eval", 20, 0), SplitFacts("val", 20, 0))
    assert run.started.splits == facts
    assert [event.text for event in events if isinstance(event, Note)] == [
        f"{name}: only 20 photos: ten random neighbors would agree by 53 %" for name in ("eval", "val")
    ]
    assert not any(isinstance(event, RunStarted) for event in events)
    batches = UniformBatchSampler(20, 16, 1, 1)
    assert next(run.loader.epoch(1)).index.tolist() == next(batches.batches_of(1))
    assert next(run.loader.epoch(1)).labels.tolist() == [-1] * 16


def test_class_folders_without_their_labels(flags: Flags, tiny_set: Path, tmp_path: Path) -> None:
    """The images of the evaluation classes are measured; the file keeps which classes were trained on."""
    run = build(flags, dataset="folder", data=str(tiny_set / "images"), labels=False)
    classes = load_dataset("folder", tiny_set / "images")
    assert run.evaluation["eval"].images == classes[1].without_labels().decoded(MAX_PIXELS, OWN_FIT)
    assert run.header.seen_classes == seen_classes(classes[0]) != ()
    train(run, silent)
    assert all("overlap@10" in row["figures"]["eval"] for row in read(tmp_path / "run")[0])
    assert read_header(tmp_path / "run/last.safetensors").dataset == "folder"


def test_with_labels_nothing_of_it_is_there(
    flags: Flags, tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> dict[str, float]:
        raise AssertionError

    monkeypatch.setattr("rkd_cli.training.loop.agreement", refuse)
    train(build(flags, dataset="folder", data=str(tiny_set / "images"), batch="8"), silent)
    for name in ("metrics.jsonl", "result.json"):
        assert "agreement" not in (tmp_path / "run" / name).read_text()


@pytest.mark.parametrize("dataset", ["images", "folder"])
def test_what_needs_labels_names_the_flag(flags: Flags, dataset: str) -> None:
    without: Flags = {"dataset": dataset, "labels": dataset == "images"}
    flag = "--dataset images" if dataset == "images" else "--no-labels"
    with pytest.raises(SettingsError, match=rf"^--triplet-ratio 0.5: needs labels, but {flag} is given"):
        resolve(DistillSettings, flags | without | {"triplet_ratio": "0.5"})
    with pytest.raises(SettingsError, match=rf"^{flag}: `rkd train-teacher` needs labels. Use `rkd distill`.$"):
        resolve(TeacherSettings, without)


def test_too_few_photos_are_one_line(flags: Flags, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--batch 41: .* has only 40 images. Use --batch 40 or less"):
        build(flags, batch="41")
    for path in sorted((tmp_path / "photos").iterdir())[:21]:
        path.unlink()
    with pytest.raises(DataError, match=r"39 images are too few to split off"):
        build(flags)


def test_cached_views_measure_like_a_live_teacher(flags: Flags, tmp_path: Path) -> None:
    train(build(flags), silent)
    live = read(tmp_path / "run")[0][0]
    train(build(flags, teacher_views="2", views_precision="fp32", save_dir=str(tmp_path / "cached")), silent)
    cached = read(tmp_path / "cached")[0][0]
    assert cached["figures"]["eval"] == pytest.approx(live["figures"]["eval"], abs=0.03)


def vectors_of(flags: Flags, tmp_path: Path, left_out: dict[str, int]) -> Flags:
    """A vectors file of the teacher without some photos of each split."""
    root = Path(str(flags["data"]))
    paths: list[Path] = []
    for images in load_dataset("images", root):
        paths += images.paths[left_out.get(images.name, 0) :]
    images = ImageSet(tuple(paths), None, ())
    write_vectors(
        tmp_path / "t.npz", embedded(Path(str(flags["teacher"])), images).numpy(), relative_names(images.paths, root)
    )
    return flags | {"teacher": str(tmp_path / "t.npz")}


def test_photos_that_a_file_of_embeddings_lacks_are_left_out(flags: Flags, tmp_path: Path) -> None:
    events: list[Event] = []
    run = build(vectors_of(flags, tmp_path, {"train": 3, "eval": 5}), events)
    assert [(facts.name, facts.images) for facts in run.started.splits] == [("train", 37), ("eval", 15)]
    notes = [event.text for event in events if isinstance(event, Note)]
    assert [note.split(", first")[0].split(": ", 1)[1] for note in notes[:2]] == [
        "no embedding of 3 train images", "no embedding of 5 eval images"
    ]  # fmt: skip
    assert all(note.endswith("they are left out") for note in notes[:2])
    assert notes[2] == "eval: only 15 photos: ten random neighbors would agree by 71 %"
    train(run, silent)
    rows, _ = read(tmp_path / "run")
    images = run.evaluation["eval"].images
    student = embedded(tmp_path / "run/last.safetensors", images)
    found = agreement(student, embedded(Path(str(flags["teacher"])), images))
    assert rows[-1]["figures"]["eval"] == pytest.approx(found, abs=0.03)


def test_a_vectors_file_without_validation_photos_is_one_line(flags: Flags, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"t.npz: has no embedding of the eval images. Its paths must") as caught:
        build(vectors_of(flags, tmp_path, {"eval": 20}))
    assert len(caught.value.problems) == 1


def test_damaged_photos_are_named_or_left_out(flags: Flags, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "photos/61.jpg").write_bytes(b"no picture")
    with pytest.raises(SystemExit) as ended:
        main(["check-data", "--dataset", "images", "--data", str(flags["data"]), "--workers", "0"])
    assert ended.value.code == 2
    assert "61.jpg: cannot be decoded" in capsys.readouterr().err
    events: list[Event] = []
    run = build(flags, events, skip_damaged=True)
    assert sum(facts.images for facts in run.started.splits) == 60
    assert any(isinstance(event, Note) and "1 damaged images are left out" in event.text for event in events)


def test_recall_of_photos_is_refused(flags: Flags, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(build(flags, epochs="1"), silent)
    student = str(tmp_path / "run/last.safetensors")
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", student, "--data", str(flags["data"])])
    assert ended.value.code == 2
    says = f"rkd: error: {student}: Recall@K needs classes, which photos do not have. Choose another --dataset.\n"
    assert capsys.readouterr().err == says


def test_the_images_of_a_run_are_known_by_their_names(flags: Flags, tmp_path: Path) -> None:
    before = build(flags).directory.inputs["images"]
    assert build(flags).directory.inputs["images"] == before
    (tmp_path / "photos/00.jpg").rename(tmp_path / "photos/zz.jpg")
    assert build(flags).directory.inputs["images"] != before


def test_few_photos_are_one_batch_unless_another_is_asked_for(flags: Flags) -> None:
    events: list[Event] = []
    run = build({name: value for name, value in flags.items() if name != "batch"}, events)
    count = len(run.loader._images)
    assert 16 < count < 60
    assert Note(f"--batch {count} instead of 128: there are {count} training photos") in events
    assert [len(batch.images) for batch in run.loader.epoch(1)] == [count]
    with pytest.raises(DataError, match=f"Use --batch {count} or less"):
        build(flags, batch="128")
