"""Cars196 (Krause et al., 2013), in its original layout or that of torchvision's StanfordCars."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from rkd_cli.data.sets.listing import check_images, halves
from rkd_cli.data.splits import ImageSet
from rkd_cli.errors import DataError
from rkd_cli.events import Reporter, silent

_IMAGES = ("car_ims", "cars_train")
_FOLDERS = ("", "Cars196", "cars196", "stanford_cars")
_LAYOUT = (
    "car_ims/*.jpg with cars_annos.mat, or cars_train/*.jpg, cars_test/*.jpg, devkit/cars_train_annos.mat, "
    "devkit/cars_meta.mat and cars_test_annos_withlabels.mat"
)
_TEST = "cars_test_annos_withlabels.mat"
_REMEDY = "Get it from another copy of Cars196; the official URLs are dead."


def load_cars196(root: Path, report: Reporter = silent) -> tuple[ImageSet, ImageSet]:
    """Training and evaluation split of ``root`` or a usual subfolder: first and second half of the classes."""
    folder = find_cars196(root)
    if folder is None:
        raise DataError(
            f"{root}: contains no Cars196, whose official URLs are dead. Get a copy elsewhere, and arrange it in this "
            f"folder, or in Cars196/ or stanford_cars/ in it, as {_LAYOUT}. Or name another folder with --data."
        )
    return _load_old(folder) if (folder / "car_ims").is_dir() else _load_devkit(folder)


def find_cars196(root: Path) -> Path | None:
    """The folder of the data set in ``root``, if any."""
    folders = [root / name for name in _FOLDERS]
    return next((folder for folder in folders for name in _IMAGES if (folder / name).is_dir()), None)


def _load_old(folder: Path) -> tuple[ImageSet, ImageSet]:
    path = folder / "cars_annos.mat"
    content = _read_mat(path)
    classes = _class_names(path, content)
    return _split(folder, classes, _members(path, content, "relative_im_path", len(classes)))


def _load_devkit(folder: Path) -> tuple[ImageSet, ImageSet]:
    nested = folder / "car_devkit/devkit"  # in Kaggle's copy
    devkit = nested if nested.is_dir() else folder / "devkit"
    meta = devkit / "cars_meta.mat"
    classes = _class_names(meta, _read_mat(meta))
    test = next((path for path in (folder / _TEST, devkit / _TEST) if path.is_file()), None)
    if test is None:
        raise DataError(
            f"{folder / _TEST}: missing, and devkit/cars_test_annos.mat has no classes, also in Kaggle's copy. "
            f"{_REMEDY}"
        )
    members = []
    for images, path in (("cars_train", devkit / "cars_train_annos.mat"), ("cars_test", test)):
        annotated = _members(path, _read_mat(path), "fname", len(classes))
        inner = images if (folder / images / images).is_dir() else ""  # as Kaggle nests it
        members += [(Path(images, inner, name), label) for name, label in annotated]
    return _split(folder, classes, members)


def _split(folder: Path, classes: tuple[str, ...], members: list[tuple[Path, int]]) -> tuple[ImageSet, ImageSet]:
    check_images(folder, [name for name, _ in members], _REMEDY)
    return halves(folder, members, classes)


def _read_mat(path: Path) -> dict[str, Any]:
    from scipy.io import loadmat  # slow to import, and only needed here

    try:
        with path.open("rb") as stream, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an unreadable variable only warns; the callers check for it
            content: dict[str, Any] = loadmat(stream, squeeze_me=True, variable_names=["annotations", "class_names"])
    except FileNotFoundError:
        raise DataError(f"{path}: missing, so the data set is incomplete. {_REMEDY}") from None
    except Exception as error:  # scipy does not document its errors for damaged files
        reason = " ".join(str(error).split())[:120]
        raise DataError(f"{path}: cannot be read ({reason}). {_REMEDY}") from None
    return content


def _class_names(path: Path, content: dict[str, Any]) -> tuple[str, ...]:
    names = tuple(np.atleast_1d(content.get("class_names", ())).ravel().tolist())
    if not names or not all(_is_text(name) for name in names):
        raise DataError(f"{path}: contains no list of strings class_names. {_REMEDY}")
    return names


def _members(path: Path, content: dict[str, Any], name_field: str, classes: int) -> list[tuple[Path, int]]:
    """(image, class from 0) of each annotation."""
    annotations = np.atleast_1d(content.get("annotations", ())).ravel()
    if not {name_field, "class"} <= set(annotations.dtype.names or ()):
        raise DataError(f"{path}: contains no annotations with {name_field} and class. {_REMEDY}")
    members = []
    for number, (name, value) in enumerate(zip(annotations[name_field], annotations["class"], strict=True), 1):
        if not _is_text(name):
            raise DataError(f"{path}: annotation {number} names no image. {_REMEDY}")
        if not isinstance(value, int | float) or value not in range(1, classes + 1):
            raise DataError(f"{path}: annotation {number} ({name}) has no class from 1 to {classes}. {_REMEDY}")
        members.append((Path(name), round(value) - 1))
    return members


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value != "" and value.isprintable()
