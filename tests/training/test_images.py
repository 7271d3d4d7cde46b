"""What a training is refused for before anything is read or written: its data set, and where it writes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from rkd_cli.errors import DataError, RkdError, SettingsError
from rkd_cli.events import Event, Note, silent
from rkd_cli.models.checkpoint import read_header
from rkd_cli.runtime.distributed import ALONE
from rkd_cli.settings import DistillSettings, TeacherSettings
from rkd_cli.settings.resolve import resolve
from rkd_cli.training.images import Images, find_images, split_images
from rkd_cli.training.loop import train
from rkd_cli.training.open import build_run

Flags = dict[str, str | bool]


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four class folders, in the folder where commands run."""
    touch(tmp_path / "photos", *(f"{name}/{number}.jpg" for name in "abcd" for number in range(12)))
    monkeypatch.chdir(tmp_path)
    return Path("photos")


def prepared(model: Any, events: list[Event] | None = None, **flags: str) -> tuple[Any, Images]:
    teacher = {} if model is TeacherSettings else {"teacher": "../teachers/t.safetensors"}
    settings = resolve(model, {"device": "cpu"} | teacher | flags)
    report = silent if events is None else events.append
    settings, sets = find_images(settings, report, True)
    return settings, split_images(settings, sets, (), ALONE, report)


@pytest.mark.parametrize("model", [TeacherSettings, DistillSettings])
@pytest.mark.parametrize(
    ("data", "save_dir", "folder"),
    [
        ("photos", "photos", "photos"),
        ("photos", "photos/teacher", "photos"),
        ("photos", "photos/a/deep/teacher", "photos"),
        ("photos", "elsewhere/../photos/x", "photos"),
        ("photos", "linked/teacher", "photos"),
        ("linked", "photos/teacher", "linked"),
        (".", "./teacher", "."),
        (".", ".", "."),
    ],
)
@pytest.mark.parametrize("dataset", ["auto", "folder", "images"])
def test_a_run_among_the_images_is_refused(
    photos: Path, model: type, dataset: str, data: str, save_dir: str, folder: str
) -> None:
    if model is TeacherSettings and dataset == "images":
        pytest.skip("refused for its labels")
    if data == ".":
        for path in photos.iterdir():
            path.rename(path.name)
        photos.rmdir()
    Path("linked").symlink_to("photos")
    before = sorted(Path().rglob("*"))
    says = rf"^--save-dir .*: is inside the image folder {folder}. Choose a folder outside of it.$"
    with pytest.raises(SettingsError, match=says):
        prepared(model, data=data, save_dir=save_dir, dataset=dataset)
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize("save_dir", ["teacher", "photos-teacher", "elsewhere/photos/teacher", "../teacher"])
def test_a_run_outside_the_image_folder_is_allowed(photos: Path, save_dir: str) -> None:
    assert prepared(TeacherSettings, data="photos", save_dir=save_dir)[0].dataset == "folder"


def test_a_run_outside_the_folders_of_splits_is_allowed(photos: Path) -> None:
    touch(Path(), *(f"{part}/{name}/{n}.jpg" for part in ("train", "test") for name in (f"{part}1", "x") for n in "12"))
    prepared(TeacherSettings, data=".", save_dir="teacher")
    with pytest.raises(SettingsError, match=r"--save-dir test/teacher: is inside the image folder test"):
        prepared(TeacherSettings, data=".", save_dir="test/teacher")


def test_a_cache_among_the_images_is_refused(photos: Path) -> None:
    with pytest.raises(SettingsError, match=r"--cache-dir photos/cache: is inside the image folder photos"):
        prepared(TeacherSettings, data="photos", cache_dir="photos/cache")


def test_a_run_outside_a_published_set_is_allowed(tiny_set: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_set, tmp_path / "CUB_200_2011")
    for data, save_dir in (("", "teacher"), ("CUB_200_2011", "teacher")):
        settings, _ = prepared(TeacherSettings, data=str(tmp_path / data), save_dir=str(tmp_path / save_dir))
        assert settings.dataset == "cub200"
    with pytest.raises(SettingsError, match="is inside the image folder"):
        prepared(TeacherSettings, data=str(tmp_path), save_dir=str(tmp_path / "CUB_200_2011/teacher"))


def test_what_was_found_stands_in_all_files_of_a_run(tiny_set: Path, quick: Flags, tmp_path: Path) -> None:
    for number, image in enumerate(sorted(tiny_set.rglob("*.jpg"))):
        path = tmp_path / "photos" / image.parent.name / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(image, path)
    events: list[Event] = []
    data = tmp_path / "photos"
    run = build_run(resolve(TeacherSettings, quick | {"dataset": "auto", "data": str(data)}), events.append)
    train(run, silent)
    assert events[0] == Note(f"{data}: found class folders (--dataset folder)")
    assert run.started.dataset == "folder"
    assert json.loads((tmp_path / "run/settings.json").read_text())["dataset"] == "folder"
    assert read_header(tmp_path / "run/best.safetensors").dataset == "folder"


def test_images_without_classes_are_for_distill(photos: Path) -> None:
    touch(Path(), *(f"loose/{number}.jpg" for number in range(40)))
    with pytest.raises(DataError, match=r"^loose: `rkd train-teacher` needs 4 or more class folders, .* `rkd distill`"):
        prepared(TeacherSettings, data="loose")
    with pytest.raises(
        SettingsError,
        match=r"--triplet-ratio 1: needs 4 or more class folders, .* which loose",
    ):
        prepared(DistillSettings, data="loose", triplet_ratio="1", batch="20")
    settings, images = prepared(DistillSettings, data="loose")
    assert (settings.dataset, settings.without_labels) == ("images", "--dataset images")
    assert images.splits["train"].labels is None


def test_photos_are_not_offered_cub(photos: Path) -> None:
    touch(Path(), "films/1.mp4")
    with pytest.raises(RkdError) as caught:
        prepared(TeacherSettings, data="films")
    assert "download-cub" not in caught.value.problems[0]
