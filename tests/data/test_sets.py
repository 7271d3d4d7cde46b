"""The data sets on disk: their splits, and one clear line for each way they can be wrong."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest

from rkd_cli.data import DATASETS, load_dataset
from rkd_cli.data.archive import extract
from rkd_cli.data.sets.cub200 import load_cub200
from rkd_cli.data.sets.folder import load_folder
from rkd_cli.errors import DataError
from rkd_cli.events import Event, Note, silent
from rkd_cli.settings import Dataset


@pytest.fixture
def cub(tmp_path: Path) -> Path:
    """A CUB of five species, two images each, of which no pixel is looked at."""
    root = tmp_path / "CUB_200_2011"
    classes = [f"{n:03d}.Bird_{n}" for n in range(1, 6)]
    names = [f"{c}/Bird_{i}.jpg" for c in classes for i in range(2)]
    for name in names:
        (root / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "images" / name).touch()
    write_list(root / "classes.txt", classes)
    write_list(root / "images.txt", names)
    write_list(root / "image_class_labels.txt", [str(i // 2 + 1) for i in range(10)])
    return root


def write_list(path: Path, entries: list[str]) -> int:
    return path.write_text("".join(f"{n} {entry}\n" for n, entry in enumerate(entries, 1)))


def test_cub_splits_its_classes_in_halves(cub: Path) -> None:
    for root in (cub, cub.parent):
        train, evaluation = load_cub200(root)
        assert train.classes == ("001.Bird_1", "002.Bird_2")
        assert evaluation.classes == ("003.Bird_3", "004.Bird_4", "005.Bird_5")
        assert train.labels == (0, 0, 1, 1)
        assert evaluation.labels == (0, 0, 1, 1, 2, 2)
        assert train.paths[0] == cub / "images/001.Bird_1/Bird_0.jpg"


def test_the_real_sample(cub10_archive: Path, tmp_path: Path) -> None:
    extract(cub10_archive, tmp_path, "CUB_200_2011", silent)
    train, evaluation = load_cub200(tmp_path)
    assert len(train) + len(evaluation) == 543
    assert train.classes[0] == "001.Black_footed_Albatross"
    assert len(train.classes) == len(evaluation.classes) == 5
    for split in (train, evaluation):
        for path, label in zip(split.paths, split.labels or (), strict=True):
            assert path.is_file()
            assert path.parent.name == split.classes[label]
    for path in evaluation.paths[:5]:
        path.unlink()
    shutil.rmtree(train.paths[0].parent)
    with pytest.raises(DataError, match=r"65 of 543 images are missing \(001.*, \.\.\.\).*rkd download-cub --data"):
        load_cub200(tmp_path)


BREAKS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "no such folder. Download it with `rkd download-cub"),
    "no list": (lambda root: (root / "classes.txt").unlink(), r"classes.txt: missing, so the data set is incomplete"),
    "empty list": (lambda root: (root / "classes.txt").write_text("\n"), r"classes.txt: is empty"),
    "binary list": (lambda root: (root / "images.txt").write_bytes(b"\xff\xfe\x00"), r"images.txt: cannot be read"),
    "torn line": (lambda root: (root / "images.txt").write_text("1 a/b.jpg\n2"), r"images.txt, line 2: expected"),
    "number twice": (lambda root: (root / "images.txt").write_text("1 a/b.jpg\n1 c.jpg"), r"line 2: expected a new"),
    "unknown class": (
        lambda root: write_list(root / "image_class_labels.txt", ["9"] * 10),
        r"image 1 \(001.Bird_1/Bird_0.jpg\) has no class",
    ),
    "no label": (lambda root: write_list(root / "image_class_labels.txt", ["1"]), r"image 2 .* has no class"),
    "climbing name": (lambda root: write_list(root / "images.txt", ["../../x.jpg"] * 10), "is outside of this folder"),
    "absolute name": (lambda root: write_list(root / "images.txt", ["/etc/x.jpg"] * 10), "is outside of this folder"),
    "missing image": (
        lambda root: (root / "images/004.Bird_4/Bird_1.jpg").unlink(),
        r"1 of 10 images are missing \(004.Bird_4/Bird_1.jpg\)",
    ),
    "one class": (
        lambda root: [
            write_list(root / f"{name}.txt", entries)
            for name, entries in (("classes", ["001.Bird_1"]), ("image_class_labels", ["1"] * 10))
        ],
        "one half of the 1 classes has no images",
    ),
}


@pytest.mark.parametrize("kind", BREAKS)
def test_a_broken_cub_is_one_line(cub: Path, kind: str) -> None:
    break_it, says = BREAKS[kind]
    break_it(cub)
    with pytest.raises(DataError, match=says) as caught:
        load_cub200(cub.parent)
    (problem,) = caught.value.problems
    assert "\n" not in problem


def make_classes(root: Path, *names: str) -> None:
    for name in names:
        (root / name).mkdir(parents=True)
        for image in ("b.PNG", "a.jpg", "notes.txt", ".hidden.jpg"):
            (root / name / image).touch()


def test_a_folder_splits_its_sorted_classes_in_halves(tmp_path: Path) -> None:
    make_classes(tmp_path, "d", "a", "c", "e", "b", ".cache", "__MACOSX")
    train, evaluation = load_folder(tmp_path)
    assert load_folder(str(tmp_path)) == (train, evaluation)
    assert load_dataset("auto", str(tmp_path))[0].paths == train.paths
    assert (train.classes, evaluation.classes) == (("a", "b"), ("c", "d", "e"))
    assert [str(p.relative_to(tmp_path)) for p in train.paths] == ["a/a.jpg", "a/b.PNG", "b/a.jpg", "b/b.PNG"]
    assert evaluation.labels == (0, 0, 1, 1, 2, 2)


def test_a_folder_with_train_and_eval_keeps_them(tmp_path: Path) -> None:
    make_classes(tmp_path / "train", "x", "y")
    make_classes(tmp_path / "eval", "z", "w")
    events: list[Event] = []
    train, evaluation = load_folder(tmp_path, events.append)
    assert (train.classes, evaluation.classes) == (("x", "y"), ("w", "z"))
    assert events == [Note(f"{tmp_path}: files that are not images are left out: 4 .txt")]


@pytest.mark.parametrize(
    ("folders", "read"),
    [
        ("Train Eval", ("Train", "Eval")),
        ("TRAINING EVALUATION", ("TRAINING", "EVALUATION")),
        ("train val", ("train", "val")),
        ("train valid", ("train", "valid")),
        ("train validation", ("train", "validation")),
        ("training testing", ("training", "testing")),
        ("train valid test", ("train", "test")),
        ("Train Val Test Extra", ("Train", "Test")),
        ("train validation test eval", ("train", "eval")),
    ],
)
@pytest.mark.parametrize("name", ["folder", "images"])
def test_folders_of_splits_have_many_names(tmp_path: Path, name: str, folders: str, read: tuple[str, str]) -> None:
    for folder in folders.split():
        make_classes(tmp_path / folder, f"{folder}1", f"{folder}2")
    events: list[Event] = []
    for split, folder in zip(load_dataset(name, tmp_path, events.append), read, strict=True):
        assert {path.parts[len(tmp_path.parts)] for path in split.paths} == {folder}
        assert split.classes == ((f"{folder}1", f"{folder}2") if name == "folder" else ())
    others = sorted({*folders.split()} - {*read})
    texts = [event.text for event in events if isinstance(event, Note) and "are read, not" in event.text]
    alone = f"{tmp_path}: only {read[0]}/ and {read[1]}/ are read, not {', '.join(others)}"
    assert [text.partition(" (")[0] for text in texts] == ([alone] if others else [])


def test_a_split_of_two_names_is_one_line(tmp_path: Path) -> None:
    for folder in ("train", "valid", "val"):
        make_classes(tmp_path / folder, "x", "y")
    with pytest.raises(DataError, match=r"val/ and valid/ are the same split. Rename or remove one.$"):
        load_folder(tmp_path)


def test_a_split_without_another_is_no_class(tmp_path: Path) -> None:
    make_classes(tmp_path / "Train", "x", "y")
    make_classes(tmp_path, "holdout", "labels", "masks")
    says = r"Train: contains class folders, but .* contains no eval/, test/ or val/"
    with pytest.raises(DataError, match=says) as caught:
        load_folder(tmp_path)
    assert len(caught.value.problems) == 1


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    make_classes(tmp_path, "bus", "car", "plane", "train")
    assert [split.classes for split in load_folder(tmp_path)] == [("bus", "car"), ("plane", "train")]


def test_known_classes_are_not_called_unseen(tmp_path: Path) -> None:
    for part in ("train", "val"):
        make_classes(tmp_path / part, "x", "y")
    for name in "xy":
        (tmp_path / "val" / name / "a.jpg").write_text("other pixels")
    events: list[Event] = []
    load_folder(tmp_path, events.append)
    says = f"{tmp_path}: all 2 classes in val/ are in train/ too. The evaluation measures new images of known classes."
    assert [event.text.startswith(says) for event in events if isinstance(event, Note)] == [False, True]


def test_a_class_in_both_train_and_eval_is_named(tmp_path: Path) -> None:
    make_classes(tmp_path / "train", "x", "y")
    make_classes(tmp_path / "eval", "x", "z", "w")
    (tmp_path / "eval/x/a.jpg").write_text("other pixels")
    events: list[Event] = []
    assert load_folder(tmp_path, events.append)[1].classes == ("w", "x", "z")
    assert events[1:] == [Note("1 of 3 classes in eval/ are in train/ too: x")]


def test_what_is_left_out_of_a_folder_is_told(tmp_path: Path) -> None:
    make_classes(tmp_path, "a", "b", "c")
    for name in ("loose1.jpg", "loose2.PNG", "list.csv", "a/x.svg", "b/2.svg", "c/README", "d/2020/1.jpg", ".x.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    events: list[Event] = []
    train, evaluation = load_folder(tmp_path, events.append)
    assert (len(train), len(evaluation), evaluation.classes) == (4, 3, ("c", "d"))
    texts = [
        "files that are not images are left out: 3 .txt, 2 .svg, 1 .csv, ...",
        "2 images outside of class folders are left out: loose1.jpg, loose2.PNG",
        f"1 folders inside class folders are not classes of their own, first {tmp_path}/d/2020",
        "1 of 4 classes have a single image, which forms no pair. Add images, or distil without labels (--no-labels).",
    ]
    assert events == [Note(f"{tmp_path}: {text}") for text in texts]


def test_what_is_left_out_beside_train_and_eval_is_told(tmp_path: Path) -> None:
    for part in ("train", "eval", "val"):
        make_classes(tmp_path / part, f"{part}1", f"{part}2")
    for name in ("1.jpg", "train/2.jpg", "val/3.gif"):
        (tmp_path / name).touch()
    events: list[Event] = []
    load_folder(tmp_path, events.append)
    val = "val (--select-on val uses a part of train/ as the validation split)"
    assert events == [
        Note(f"{tmp_path}: only train/ and eval/ are read, not 1.jpg, {val}"),
        Note(f"{tmp_path}: files that are not images are left out: 4 .txt"),
        Note(f"{tmp_path / 'train'}: 1 images outside of class folders are left out: 2.jpg"),
    ]


@pytest.mark.parametrize("how", ["copied", "linked"])
def test_the_same_files_in_train_and_eval_are_refused(tmp_path: Path, how: str) -> None:
    make_classes(tmp_path / "train", "x", "y")
    if how == "copied":
        shutil.copytree(tmp_path / "train", tmp_path / "eval")
    else:
        (tmp_path / "eval").symlink_to("train")
    with pytest.raises(DataError, match="class x has the same files in train/ and eval/") as caught:
        load_folder(tmp_path)
    assert len(caught.value.problems) == 1


def test_a_cache_of_an_earlier_version_is_told_of(tmp_path: Path) -> None:
    make_classes(tmp_path, "a", "b", "c", "d", ".rkd-cache")
    events: list[Event] = []
    load_dataset("folder", tmp_path, events.append)
    note = events[-1]
    assert isinstance(note, Note) and "no longer used. You can delete it." in note.text


def test_a_wrong_folder_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent: no such folder. --dataset folder needs one folder"):
        load_folder(tmp_path / "absent")
    make_classes(tmp_path, "a", "b", "c")
    with pytest.raises(DataError, match="3 class folders, at least 4 are needed"):
        load_folder(tmp_path)
    (tmp_path / "d").mkdir()
    with pytest.raises(DataError, match=r"d: class folder without images \(.jpg"):
        load_folder(tmp_path)
    make_classes(tmp_path / "train", "a", "b")
    make_classes(tmp_path / "eval", "a")
    with pytest.raises(DataError, match=r"eval: 1 class folders, at least 2"):
        load_folder(tmp_path)


def test_the_characters(omniglot_archive: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(omniglot_archive) as archive:
        archive.extractall(tmp_path)
    train, evaluation = load_folder(tmp_path)
    assert (len(train.classes), len(evaluation.classes)) == (58, 59)
    assert (len(train), len(evaluation)) == (1160, 1180)


def test_every_dataset_name_has_its_loader(tmp_path: Path) -> None:
    assert set(DATASETS) == set(get_args(Dataset))
    for name in ("nothing", "birds", "../x", "images.os"):
        with pytest.raises(DataError, match="unknown data set"):
            load_dataset(name, tmp_path)
