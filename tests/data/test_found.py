"""What a folder holds is told by its layout: the sets that are published, class folders, or images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rkd_cli.data import find_dataset, load_dataset
from rkd_cli.data.found import image_folders
from rkd_cli.errors import DataError
from rkd_cli.events import Event, Note
from trees import touch

Run = Callable[..., tuple[int, str, str]]


CLASSES = [f"{name}/{number}.jpg" for name in "abcd" for number in range(2)]
LAYOUTS = {
    "cub200 in its folder": ("cub200", ["CUB_200_2011/images/001.A/1.jpg"]),
    "cub200": ("cub200", ["images.txt", "image_class_labels.txt", "classes.txt", "images/001.A/1.jpg"]),
    "cub200 without a list": ("cub200", ["images.txt", "image_class_labels.txt", "images/001.A/1.jpg"]),
    "cars196 of its authors": ("cars196", ["car_ims/000001.jpg", "cars_annos.mat"]),
    "cars196 of torchvision": ("cars196", ["stanford_cars/cars_train/00001.jpg", "stanford_cars/devkit/x.mat"]),
    "sop": ("sop", ["Ebay_train.txt", "Ebay_test.txt", "bicycle_final/1.JPG"]),
    "sop in its folder": ("sop", ["Stanford_Online_Products/Ebay_train.txt"]),
    "drawn birds": ("demo", ["demo-birds/demo.json", "demo-birds/images/1/1.jpg", "CUB_200_2011.tgz"]),
    "cub200 beside drawn birds": ("cub200", ["demo-birds/demo.json", "CUB_200_2011/images.txt"]),
    "class folders": ("folder", CLASSES),
    "class folders and a list": ("folder", [*CLASSES, "images.txt", "readme.md"]),
    "class folders and some images": ("folder", [*CLASSES, "cover.jpg"]),
    "splits of class folders": ("folder", [f"{part}/{name}" for part in ("Train", "Test") for name in CLASSES]),
    "some folders in a heap of images": ("images", [*CLASSES, *(f"IMG_{number}.jpg" for number in range(8))]),
    "three folders": ("images", CLASSES[:6]),
    "three folders and one of a NAS": ("images", [*CLASSES[:6], "@eaDir/1.jpg", "#recycle/2.jpg"]),
    "loose images": ("images", ["1.jpg", "2.jpg"]),
    "splits of images": ("images", ["train/1.jpg", "eval/2.jpg"]),
    "a camera's card": ("images", ["DCIM/100APPLE/1.JPG", "DCIM/101APPLE/2.JPG", "MISC/x.txt"]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_is_recognized(tmp_path: Path, layout: str) -> None:
    name, files = LAYOUTS[layout]
    touch(tmp_path, *files)
    events: list[Event] = []
    assert find_dataset(tmp_path, events.append) == name
    (note,) = events
    assert isinstance(note, Note) and note.text.startswith(f"{tmp_path}: found ")
    assert f" (--dataset {name})" in note.text
    too_few = ("three folders", "three folders and one of a NAS", "a camera's card")
    assert ("to use folders as classes" in note.text) == (layout in too_few)


def test_a_folder_of_two_sets_is_one_line(tmp_path: Path) -> None:
    touch(tmp_path, "CUB_200_2011/images.txt", "Ebay_train.txt")
    with pytest.raises(DataError, match=r"contains cub200 and sop. Name one of them with --dataset.$"):
        find_dataset(tmp_path)


def test_where_nothing_fits_what_is_looked_for_is_listed(tmp_path: Path) -> None:
    touch(tmp_path, "notes.txt", "films/1.mp4")
    with pytest.raises(DataError) as caught:
        find_dataset(tmp_path)
    (problem,) = caught.value.problems
    for part in (
        "contains no images and no known data set",
        ".jpg",
        "class folders",
        "CUB_200_2011/",
        "car_ims/",
        "Ebay_train",
    ):
        assert part in problem
    assert "download-cub" not in problem  # 1.1 GB are not for a folder of something else


@pytest.mark.parametrize("there", ["", ".keep", "CUB_200_2011.tgz.part"])
def test_an_empty_or_missing_folder_says_how_to_get_cub(tmp_path: Path, there: str) -> None:
    root = tmp_path / "data"
    if there:
        touch(root, there)
    with pytest.raises(DataError, match=rf"`rkd download-cub --data {root}` downloads CUB-200-2011"):
        find_dataset(root)


def test_auto_loads_what_was_found(tmp_path: Path) -> None:
    touch(tmp_path, *CLASSES)
    train, evaluation = load_dataset("auto", tmp_path)
    assert (train.classes, evaluation.classes) == (("a", "b"), ("c", "d"))


def test_the_folders_that_a_set_is_read_from(tmp_path: Path) -> None:
    touch(tmp_path, *CLASSES, "CUB_200_2011/images.txt")
    assert image_folders("folder", tmp_path) == image_folders("images", tmp_path) == (tmp_path,)
    assert image_folders("cub200", tmp_path) == (tmp_path / "CUB_200_2011",)
    assert image_folders("demo", tmp_path) == (tmp_path / "demo-birds",)
    touch(tmp_path, "train/a/1.jpg", "eval/a/1.jpg")
    assert image_folders("folder", tmp_path) == (tmp_path / "train", tmp_path / "eval")


def test_check_data_names_what_it_found(tmp_path: Path, tiny_set: Path, rkd: Run) -> None:
    for number, image in enumerate(sorted(tiny_set.rglob("*.jpg"))[:16]):
        path = tmp_path / f"class {number // 4}" / image.name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(image.read_bytes())
    code, out, err = rkd("check-data", "--data", tmp_path, "--workers", 0)
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        f"note: {tmp_path}: found class folders (--dataset folder)",
        "folder: 8 images of 2 classes train, 8 images of 2 classes evaluate",
        "folder: all 16 images can be read",
    ]
