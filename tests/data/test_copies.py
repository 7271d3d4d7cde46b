"""Copies of one file: found by their bytes, told where they make figures wrong."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from rkd_cli.cli import main
from rkd_cli.data import ImageSet, copies, load_dataset
from rkd_cli.data.copies import copy_notes, find_copies
from rkd_cli.events import Event, Note
from rkd_cli.settings import TeacherSettings
from rkd_cli.settings.resolve import resolve
from rkd_cli.training.images import find_images


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_copies_are_files_of_the_same_bytes(tmp_path: Path) -> None:
    long = bytes(9000)
    contents = [b"a", b"b", b"", b"", b"a", long, b"x" + long[1:], long[:-1] + b"x", long, b"a"]
    paths = [write(tmp_path / str(number), content) for number, content in enumerate(contents)]
    paths += [tmp_path / "gone", tmp_path / "linked"]
    (tmp_path / "linked").symlink_to(paths[1])
    assert find_copies(paths) == [[0, 4, 9], [1, 11], [5, 8]]


def test_files_of_sizes_of_their_own_are_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Path] = []
    end = copies._end

    def watched(path: Path) -> bytes:
        opened.append(path)
        return end(path)

    monkeypatch.setattr(copies, "_end", watched)
    paths = [write(tmp_path / str(number), bytes(max(number, 2))) for number in range(5)]
    assert find_copies(paths) == [[0, 1, 2]]
    assert opened == paths[:3]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes a split, three images each, all different."""
    for number, name in enumerate(f"{c}/{n}.jpg" for c in ("train/a", "train/b", "eval/c", "eval/d") for n in range(3)):
        write(tmp_path / name, bytes([number]) * 100)
    return tmp_path


def notes(photos: Path) -> list[str]:
    return [note.removeprefix(f"{photos}: ") for note in copy_notes(*load_dataset("folder", photos), photos)]


def test_images_that_differ_are_no_copies(photos: Path) -> None:
    assert notes(photos) == []


def test_copies_of_training_images_in_the_evaluation_split_are_told(photos: Path) -> None:
    for old, new in (("a/0.jpg", "c/other.jpg"), ("a/1.jpg", "d/another.jpg")):
        shutil.copy(photos / "train" / old, photos / "eval" / new)
    first = "eval/c/other.jpg is train/a/0.jpg"
    second = "eval/d/another.jpg is train/a/1.jpg"
    assert notes(photos) == [f"2 evaluation images are copies of training images ({first}, {second}). Remove them."]


@pytest.mark.parametrize("split", ["train/a train/b", "eval/c eval/d"])
def test_copies_of_one_image_in_two_classes_are_told(photos: Path, split: str) -> None:
    one, other = split.split()
    shutil.copy(photos / one / "1.jpg", photos / other / "7.jpg")
    assert notes(photos) == [f"1 images are in two classes ({one}/1.jpg and {other}/7.jpg). Keep each in one."]


def test_an_evaluation_image_that_is_there_twice_is_told(photos: Path) -> None:
    shutil.copy(photos / "eval/c/1.jpg", photos / "eval/c/7.jpg")
    shutil.copy(photos / "train/a/1.jpg", photos / "train/a/7.jpg")  # as another crop of it would be
    assert notes(photos) == [
        "2 evaluation images have a copy in their class, which every query finds "
        "(eval/c/1.jpg, eval/c/7.jpg). Keep one of each."
    ]


def test_of_photos_without_labels_only_copies_of_training_photos_matter(tmp_path: Path) -> None:
    paths = tuple(write(tmp_path / f"{n}.jpg", content) for n, content in enumerate([b"a", b"a", b"b", b"b", b"a"]))
    train, evaluation = ImageSet(paths[:2], None, ()), ImageSet(paths[2:], None, ())
    (note,) = copy_notes(train, evaluation, tmp_path)
    assert note.startswith(f"{tmp_path}: 1 evaluation images are copies of training images ")
    assert "(4.jpg is 0.jpg). " in note


def test_trainings_and_check_data_tell_of_copies(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(photos / "train/a/1.jpg", photos / "train/b/7.jpg")
    says = f"{photos}: 1 images are in two classes (train/a/1.jpg and train/b/7.jpg). Keep each in one."
    settings = resolve(TeacherSettings, {"dataset": "folder", "data": str(photos), "save_dir": str(photos / "../run")})
    events: list[Event] = []
    find_images(settings, events.append, True)
    assert Note(says) in events
    with pytest.raises(SystemExit):
        main(["check-data", "--dataset", "folder", "--data", str(photos), "--workers", "0"])
    assert f"note: {says}" in capsys.readouterr().out
