"""Cars196 in both of its layouts, written as MATLAB wrote the official files, and its errors."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.io import loadmat, savemat

from rkd_cli.data.sets.cars196 import load_cars196
from rkd_cli.errors import DataError
from trees import touch

BOX = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2")
OLD = ("relative_im_path", *BOX, "class", "test")  # the official order of the fields
DEVKIT = (*BOX, "class", "fname")
NAMES = [f"Make Model C/V {number:03d} Sedan 2012" for number in range(1, 197)]
Rows = list[tuple[str, Any]]  # (image, class from 1)


def annotated(fields: tuple[str, ...], rows: Rows) -> np.ndarray:
    """A MATLAB struct array, 1 x N."""
    array = np.empty((1, len(rows)), [(field, object) for field in fields])
    for slot, (name, number) in zip(array[0], rows, strict=True):
        values = dict.fromkeys(BOX, np.uint16(30)) | {"class": number, "test": np.uint8(0)}
        for field in fields:
            slot[field] = values.get(field, name)
    return array


def cell(names: list[Any]) -> np.ndarray:
    array = np.empty((1, len(names)), object)
    array[0] = names
    return array


def save(path: Path, **content: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, content, do_compression=True)


def write_old(root: Path, rows: Rows | None = None, names: list[Any] = NAMES) -> Path:
    """Two images a class, those of a class apart as in the official list."""
    official = [(f"car_ims/{n + 1:06d}.jpg", np.uint8(n % 196 + 1)) for n in range(392)]
    touch(root, *(name for name, _ in official))
    save(root / "cars_annos.mat", annotations=annotated(OLD, rows or official), class_names=cell(names))
    return root


def write_devkit(root: Path) -> Path:
    """One image a class in each folder, of the same name."""
    rows: Rows = [(f"{n:05d}.jpg", np.uint8(n)) for n in range(1, 197)]
    touch(root, *(f"{folder}/{name}" for folder in ("cars_train", "cars_test") for name, _ in rows))
    save(root / "devkit/cars_meta.mat", class_names=cell(NAMES))
    save(root / "devkit/cars_train_annos.mat", annotations=annotated(DEVKIT, rows))
    save(root / "cars_test_annos_withlabels.mat", annotations=annotated(DEVKIT, rows[::-1]))
    unlabelled = tuple(field for field in DEVKIT if field != "class")
    save(root / "devkit/cars_test_annos.mat", annotations=annotated(unlabelled, rows))
    return root


def test_the_miniatures_nest_as_the_official_files(tmp_path: Path) -> None:
    old = loadmat(write_old(tmp_path) / "cars_annos.mat")
    assert (old["annotations"].shape, old["annotations"].dtype.names) == ((1, 392), OLD)
    assert old["annotations"][0, 4]["relative_im_path"][0] == "car_ims/000005.jpg"
    assert old["annotations"][0, 4]["class"].tolist() == [[5]]
    assert old["annotations"][0, 4]["class"].dtype == np.uint8
    assert old["class_names"].shape == (1, 196)
    assert old["class_names"][0, 195][0] == NAMES[195]
    train = loadmat(write_devkit(tmp_path) / "devkit/cars_train_annos.mat")["annotations"]
    assert (train.shape, train.dtype.names) == ((1, 196), DEVKIT)
    assert (train[0][2][5].item(), train[0][2][4].item()) == ("00003.jpg", 3)


@pytest.mark.parametrize("folder", ["", "Cars196", "cars196", "stanford_cars"])
@pytest.mark.parametrize("write", [write_old, write_devkit])
def test_the_first_98_classes_train(tmp_path: Path, folder: str, write: Callable[[Path], Path]) -> None:
    root = write(tmp_path / folder)
    train, evaluation = load_cars196(tmp_path)
    assert train.classes == tuple(NAMES[:98])
    assert evaluation.classes == tuple(NAMES[98:])
    for split in (train, evaluation):
        assert len(split) == 196
        assert sorted(split.labels or ()) == sorted([*range(98)] * 2)
        assert all(path.is_file() and root in path.parents for path in split.paths)


def test_the_class_of_an_image_and_not_its_folder_decides(tmp_path: Path) -> None:
    train, evaluation = load_cars196(write_old(tmp_path / "old"))
    assert train.labels and evaluation.labels
    assert (train.paths[98], train.labels[98]) == (tmp_path / "old/car_ims/000197.jpg", 0)
    assert (evaluation.paths[-1], evaluation.labels[-1]) == (tmp_path / "old/car_ims/000392.jpg", 97)
    train, evaluation = load_cars196(write_devkit(tmp_path / "new"))
    assert train.labels and evaluation.labels
    assert (train.paths[0], train.labels[0]) == (tmp_path / "new/cars_train/00001.jpg", 0)
    assert (train.paths[-1], train.labels[-1]) == (tmp_path / "new/cars_test/00001.jpg", 0)
    assert (evaluation.paths[98], evaluation.labels[98]) == (tmp_path / "new/cars_test/00196.jpg", 97)


def test_a_devkit_may_hold_the_test_labels(tmp_path: Path) -> None:
    write_devkit(tmp_path)
    expected = load_cars196(tmp_path)
    (tmp_path / "cars_test_annos_withlabels.mat").rename(tmp_path / "devkit/cars_test_annos_withlabels.mat")
    assert load_cars196(tmp_path) == expected


def test_each_layout_bears_the_lists_of_the_other(tmp_path: Path) -> None:
    write_devkit(tmp_path)
    (tmp_path / "cars_annos.mat").touch()  # Kaggle's copy has one without car_ims
    assert load_cars196(tmp_path)[0].paths[0].parent.name == "cars_train"
    shutil.rmtree(tmp_path / "cars_train")
    write_old(tmp_path)  # car_devkit.tgz beside car_ims.tgz
    assert load_cars196(tmp_path)[0].paths[0].parent.name == "car_ims"


def test_one_annotation_and_two_classes_are_read(tmp_path: Path) -> None:
    write_old(tmp_path, [("car_ims/000001.jpg", np.float64(1))], ["a", "b"])
    with pytest.raises(DataError, match="one half of the 2 classes has no images"):
        load_cars196(tmp_path)
    write_old(tmp_path, [("car_ims/000001.jpg", 1), ("car_ims/000002.jpg", 2.0)], ["a", "b"])
    assert [split.classes for split in load_cars196(tmp_path)] == [("a",), ("b",)]


def old_row(name: str, number: Any = 1) -> Callable[[Path], object]:
    return lambda root: write_old(root, [("car_ims/000001.jpg", 1), (name, number)])


def truncate(name: str) -> Callable[[Path], object]:
    return lambda root: (root / name).write_bytes((root / name).read_bytes()[:900])


NO_CLASS = r"cars_annos.mat: annotation 2 \(car_ims/000002.jpg\) has no class from 1 to 196"
BREAKS_OLD: dict[str, tuple[Callable[[Path], object], str]] = {
    "no list": (
        lambda root: (root / "cars_annos.mat").unlink(),
        "cars_annos.mat: missing, so the data set is incomplete",
    ),
    "truncated": (
        truncate("cars_annos.mat"),
        r"cars_annos.mat: (cannot be read|contains no list of strings class_names)",
    ),
    "no mat": (lambda root: (root / "cars_annos.mat").write_text("<html>\n" * 99), "cars_annos.mat: cannot be read"),
    "empty": (lambda root: (root / "cars_annos.mat").write_bytes(b""), "cars_annos.mat: cannot be read"),
    "version 7.3": (
        lambda root: (root / "cars_annos.mat").write_bytes(b"MATLAB 7.3".ljust(124) + b"\x00\x02IM" + bytes(99)),
        "cars_annos.mat: cannot be read .*HDF",
    ),
    "climbing": (old_row("car_ims/../../x.jpg"), r"listed image 'car_ims/\.\./\.\./x.jpg' is outside of this folder"),
    "absolute": (old_row("/etc/x.jpg"), "listed image '/etc/x.jpg' is outside of this folder"),
    "line break": (old_row("car_ims/\n.jpg"), "cars_annos.mat: annotation 2 names no image"),
    "no name": (old_row(""), "annotation 2 names no image"),
    "class 0": (old_row("car_ims/000002.jpg", 0), NO_CLASS),
    "class 197": (old_row("car_ims/000002.jpg", 197), NO_CLASS),
    "class 1.5": (old_row("car_ims/000002.jpg", 1.5), NO_CLASS),
    "class nan": (old_row("car_ims/000002.jpg", np.nan), NO_CLASS),
    "class text": (old_row("car_ims/000002.jpg", "one"), NO_CLASS),
    "two classes": (old_row("car_ims/000002.jpg", [1, 2]), NO_CLASS),
    "no class names": (
        lambda root: write_old(root, names=[]),
        "cars_annos.mat: contains no list of strings class_names",
    ),
    "class number": (
        lambda root: write_old(root, names=["a", 2.0]),
        "cars_annos.mat: contains no list of strings class_names",
    ),
    "no annotations": (
        lambda root: save(root / "cars_annos.mat", class_names=cell(NAMES)),
        "contains no annotations with relative_im_path and class",
    ),
    "no struct": (
        lambda root: save(root / "cars_annos.mat", class_names=cell(NAMES), annotations=np.zeros((1, 3))),
        "contains no annotations with relative_im_path and class",
    ),
    "missing images": (
        lambda root: list(map(Path.unlink, (root / f"car_ims/{n:06d}.jpg" for n in (3, 5, 7, 9, 390)))),
        r"5 of 392 images are missing \(car_ims/000003.jpg, car_ims/000005.jpg, car_ims/000007.jpg, \.\.\.\)",
    ),
    "missing folder": (old_row("other/000002.jpg"), r"1 of 2 images are missing \(other/000002.jpg\)"),
    "file for a folder": (old_row("cars_annos.mat/2.jpg"), r"1 of 2 images are missing \(cars_annos.mat/2.jpg\)"),
}
BREAKS_DEVKIT: dict[str, tuple[Callable[[Path], object], str]] = {
    "no names": (lambda root: (root / "devkit/cars_meta.mat").unlink(), "cars_meta.mat: missing"),
    "no train list": (lambda root: (root / "devkit/cars_train_annos.mat").unlink(), "cars_train_annos.mat: missing"),
    "no test labels": (
        lambda root: (root / "cars_test_annos_withlabels.mat").unlink(),
        "cars_test_annos_withlabels.mat: missing, and devkit/cars_test_annos.mat has no classes",
    ),
    "unlabelled": (
        lambda root: shutil.copy(root / "devkit/cars_test_annos.mat", root / "cars_test_annos_withlabels.mat"),
        "withlabels.mat: contains no annotations with fname and class",
    ),
    "no test images": (
        lambda root: shutil.rmtree(root / "cars_test"),
        r"196 of 392 images are missing \(cars_test/00196.jpg, cars_test/00195.jpg, cars_test/00194.jpg, \.\.\.\)",
    ),
    "absolute": (
        lambda root: save(root / "devkit/cars_train_annos.mat", annotations=annotated(DEVKIT, [("/etc/x.jpg", 1)])),
        "listed image '/etc/x.jpg' is outside of this folder",
    ),
}


@pytest.mark.parametrize(
    ("write", "kind"),
    [(write_old, kind) for kind in BREAKS_OLD] + [(write_devkit, kind) for kind in BREAKS_DEVKIT],
)
def test_a_broken_set_is_one_line(tmp_path: Path, write: Callable[[Path], Path], kind: str) -> None:
    break_it, says = (BREAKS_OLD if write is write_old else BREAKS_DEVKIT)[kind]
    break_it(write(tmp_path / "Cars196"))
    with pytest.raises(DataError, match=says) as caught:
        load_cars196(tmp_path)
    (problem,) = caught.value.problems
    assert "\n" not in problem
    assert "from another copy of Cars196" in problem


def test_no_set_shows_both_layouts(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="contains no Cars196, whose official URLs are dead") as caught:
        load_cars196(tmp_path / "absent")
    (problem,) = caught.value.problems
    assert "car_ims/*.jpg with cars_annos.mat, or cars_train/*.jpg, cars_test/*.jpg, devkit/" in problem
    assert "\n" not in problem


@pytest.mark.parametrize("seed", range(20))
def test_a_damaged_list_never_ends_in_a_traceback(tmp_path: Path, seed: int) -> None:
    path = write_old(tmp_path) / "cars_annos.mat"
    data = bytearray(path.read_bytes())
    generator = np.random.default_rng(seed)
    for position in generator.integers(128, len(data), 3):  # behind the header
        data[position] ^= 0x55
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"cars_annos\.mat: ") as caught:
        load_cars196(tmp_path)
    (problem,) = caught.value.problems
    assert "\n" not in problem


def test_images_are_read_as_kaggle_nests_them(tmp_path: Path) -> None:
    expected = load_cars196(write_devkit(tmp_path))
    for name in ("cars_train", "cars_test"):
        (tmp_path / name).rename(tmp_path / "moved")
        (tmp_path / name).mkdir()
        (tmp_path / "moved").rename(tmp_path / name / name)
    (tmp_path / "car_devkit").mkdir()
    (tmp_path / "devkit").rename(tmp_path / "car_devkit/devkit")
    found = load_cars196(tmp_path)
    assert [i.labels for i in found] == [i.labels for i in expected]
    assert found[0].paths[0] == tmp_path / "cars_train/cars_train" / expected[0].paths[0].name
    (tmp_path / "cars_test_annos_withlabels.mat").unlink()
    with pytest.raises(DataError, match="has no classes, also in Kaggle's copy"):
        load_cars196(tmp_path)
