"""Common parts of the data sets with lists: check the listed files, split the classes in halves, make the sets."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from rkd_cli.data.decode import Box, Decoding
from rkd_cli.data.splits import ImageSet, Role
from rkd_cli.data.walk import some
from rkd_cli.errors import DataError


class Listed(NamedTuple):
    """An image of a list."""

    path: Path
    label: str | None = None  # None in all of a set without classes
    role: Role | None = None  # None: both
    camera: str | None = None  # None in all of a set without cameras
    box: Box | None = None
    line: int = 0


def image_set(listed: Sequence[Listed], prefix: str = "") -> ImageSet:
    """A set of ``listed``, with sorted classes named after ``prefix`` and the label."""
    boxes = {image.path: image.box for image in listed if image.box}
    classes, labels = _numbered([image.label for image in listed])
    return ImageSet(
        tuple(image.path for image in listed),
        labels,
        tuple(prefix + name for name in classes),
        decoding=Decoding(boxes=boxes),
        roles=tuple(image.role or "both" for image in listed) if {i.role for i in listed} - {None, "both"} else None,
        cameras=_numbered([image.camera for image in listed])[1],
    )


def _numbered(names: Sequence[str | None]) -> tuple[list[str], tuple[int, ...] | None]:
    """``sorted_classes`` and the place of each name; None without names."""
    present = [name for name in names if name is not None]
    if len(present) < len(names) or not names:
        return [], None
    order = sorted_classes(set(present))
    number = {name: place for place, name in enumerate(order)}
    return order, tuple(number[name] for name in present)


def sorted_classes(classes: Collection[str]) -> list[str]:
    """As numbers if all are, so that 9 comes before 10."""
    return sorted(classes, key=int) if all(name.isdecimal() for name in classes) else sorted(classes)


def without_answer(images: ImageSet) -> list[int]:
    """The queries that have no image of their label in the gallery, from another camera if there are cameras."""
    labels, n = images.labels or (), len(images)
    roles, cameras = images.roles or ("both",) * n, images.cameras or tuple(range(n))
    there: dict[int, set[int]] = {}  # {label: cameras of its gallery}; without cameras, every image has its own
    for label, role, camera in zip(labels, roles, cameras, strict=True):
        if role != "query":
            there.setdefault(label, set()).add(camera)
    return [
        row
        for row, (label, role, camera) in enumerate(zip(labels, roles, cameras, strict=True))
        if role != "gallery" and not there.get(label, set()) - {camera}
    ]


def read_lines(path: Path, remedy: str) -> list[str]:
    """The lines of an official list."""
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise DataError(f"{path}: missing, so the data set is incomplete. {remedy}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}). {remedy}") from None


def halves(folder: Path, members: Sequence[tuple[Path, int]], classes: tuple[str, ...]) -> tuple[ImageSet, ImageSet]:
    """Training and evaluation split: the first and the second half of ``classes``, in official order.

    ``members`` are (path relative to ``folder``, index of the class).
    """
    half = len(classes) // 2
    train = [(folder / name, label) for name, label in members if label < half]
    evaluation = [(folder / name, label - half) for name, label in members if label >= half]
    if not train or not evaluation:
        raise DataError(f"{folder}: one half of the {len(classes)} classes has no images. Get the whole data set.")
    return _image_set(train, classes[:half]), _image_set(evaluation, classes[half:])


def _image_set(members: list[tuple[Path, int]], classes: tuple[str, ...]) -> ImageSet:
    paths, labels = zip(*members, strict=True)
    return ImageSet(paths, labels, classes)


def check_images(folder: Path, names: Sequence[Path], remedy: str) -> None:
    """Raise a DataError unless all ``names`` are relative paths of existing files inside ``folder``."""
    for name in names:
        if name.is_absolute() or ".." in name.parts:
            raise DataError(f"{folder}: listed image {str(name)!r} is outside of this folder. {remedy}")
    if missing := missing_files(names, folder):
        raise DataError(f"{folder}: {len(missing)} of {len(names)} images are missing ({some(missing)}). {remedy}")


def missing_files(names: Iterable[Path], folder: Path = Path()) -> list[Path]:
    """Those of ``names``, relative to ``folder``, that are no files: by one listing per folder, not one stat each."""
    names = list(names)
    present = {parent: _listing(folder / parent) for parent in {name.parent for name in names}}
    return [name for name in names if name.name not in present[name.parent]]


def _listing(folder: Path) -> set[str]:
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a zero byte in the name
        return set()
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed ({error.strerror})") from None
