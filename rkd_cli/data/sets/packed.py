"""Images in tar, zip and parquet files, and in Hugging Face data sets; ``members`` reads them."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rkd_cli.data.members import SUFFIXES, MemberPaths, hub_splits, is_hub, list_members, take
from rkd_cli.data.sets.listing import sorted_classes
from rkd_cli.data.sets.lists import SPLITS, make_splits, note_classes
from rkd_cli.data.splits import ImageSet
from rkd_cli.data.walk import is_image, walk
from rkd_cli.errors import DataError
from rkd_cli.events import Note, Progress, Reporter, silent

_ARCHIVES = (".tar", ".zip")
_COMPRESSED = (".tgz", ".gz", ".bz2", ".xz", ".zst")
_BRACES = re.compile(r"\{(?:(\d{1,6})\.\.(\d{1,6})|([^{}]*,[^{}]*))\}")
_NAMES = ("", "train", "val", "eval")  # of splits, by number
_LEAST = 4  # class folders


def is_packed(root: Path) -> bool:
    """Whether ``--data`` names tar or zip files, a Hugging Face data set, or a folder of such files without images."""
    if not root.is_dir():
        return is_hub(root) or root.suffix.lower() in (*_ARCHIVES, *_COMPRESSED)
    found = False
    for _, _, names in os.walk(root):
        if any(map(is_image, names)):
            return False
        found |= any(name.lower().endswith(SUFFIXES) for name in names)
    return found


def load_packed(root: str | Path, report: Reporter = silent, labeled: bool = True) -> tuple[ImageSet, ImageSet]:
    """Training and evaluation split of the images in archives or tables.

    Labels are those of .cls and .json files in tar archives and of a column in tables, or else the names of class
    folders. Splits are those of a Hugging Face data set, or in the names of files or folders.

    Raises:
        DataError: a file is missing or damaged, or there are too few images.
    """
    root = Path(root)
    containers = _containers(root)
    paths, labels, classes = _read(root, containers, report)
    split = np.asarray([_split_of(root, container) for container in containers], np.int8)[paths.places[:, 0]]
    if not classes:
        labels, classes, split = _by_folder(paths, split)
    if not labeled:
        classes = ()
    used = {_NAMES[number] for number in np.unique(split)}
    if "train" not in used or used.isdisjoint(("val", "eval")):
        split[:] = 0
    wanted = (split > 0) if split.any() else np.ones(len(paths), bool)
    if classes:
        wanted &= labels >= 0
    if left := len(paths) - int(wanted.sum()):
        first = paths[int(wanted.argmin())]
        report(Note(f"{root}: {left:,} images without a label or split are left out, the first of them {first}"))
    sets = {}
    for number in np.unique(split[wanted]).tolist():
        chosen = np.flatnonzero(wanted & (split == number))
        sets[_NAMES[number]] = _image_set(take(paths, chosen), labels[chosen], classes)
    train, evaluation = make_splits(root, sets)
    if classes:
        note_classes(root, train, evaluation, report)
    return train, evaluation


def read_packed(root: Path, report: Reporter = silent) -> ImageSet:
    """All images, without labels."""
    return ImageSet(_read(root, _containers(root), report)[0], None, ())


def _containers(root: Path) -> tuple[Path, ...]:
    if is_hub(root):
        return tuple(root / split for split in hub_splits(root))
    if root.is_dir():
        return tuple(sorted(Path(*file) for file in walk(root).files if file[1].lower().endswith(SUFFIXES)))
    found = tuple(map(Path, [str(root)] if root.exists() else _expanded(str(root))))
    if missing := [path for path in found if not path.is_file()]:
        more = f" ({len(missing):,} of {len(found):,} are missing)" if len(found) > 1 else ""
        raise DataError(f"{missing[0]}: no such file{more}. Correct --data.")
    if root.suffix.lower() in _COMPRESSED:
        raise DataError(f"{root}: is compressed. Decompress it first, and pass what is in it as --data.")
    return found


def _expanded(name: str) -> list[str]:
    """The names that braces stand for, as in a shell: ``{000..099}`` or ``{a,b}``."""
    found = _BRACES.search(name)
    if not found:
        return [name]
    start, stop, listed = found.groups()
    values = listed.split(",") if listed else [f"{n:0{len(start)}}" for n in range(int(start), int(stop) + 1)]
    return [name[: found.start()] + value + rest for value in values for rest in _expanded(name[found.end() :])]


def _split_of(root: Path, container: Path) -> int:
    """The number of the split that the name of a container, or of its folder in ``root``, has."""
    name = str(container.relative_to(root)) if root.is_dir() else container.name
    words = re.split(r"[^a-z]+", name.lower())
    return next((_NAMES.index(SPLITS[word]) for word in words if word in SPLITS), 0)


def _read(
    root: Path, containers: tuple[Path, ...], report: Reporter
) -> tuple[MemberPaths, np.ndarray, tuple[str, ...]]:
    """All images, their labels (-1: none), and the classes."""
    names, places, labels = [], [], []
    number: dict[str, int] = {}
    for at, container in enumerate(containers):
        listing = list_members(container)
        count = len(listing.names)
        names.append(listing.names)
        places.append(np.stack([np.full(count, at, np.int32), np.arange(count, dtype=np.int32)], axis=1))
        known = [number.setdefault(label, len(number)) for label in listing.classes]
        labels.append(np.asarray([*known, -1], np.int32)[listing.labels])
        report(Progress("Listing images", at + 1, len(containers), "files"))
    if not sum(map(len, names)):
        raise DataError(f"{root}: contains no images. Name other files with --data.")
    return MemberPaths(containers, tuple(names), np.concatenate(places)), np.concatenate(labels), tuple(number)


def _by_folder(paths: MemberPaths, split: np.ndarray) -> tuple[np.ndarray, tuple[str, ...], np.ndarray]:
    """Labels, classes and splits by the folders in archives; no classes if most images are in none, or there are few.

    Folders that contain all images are ignored.
    """
    labels, number, depth = np.full(len(paths), -1, np.int32), dict[str, int](), 0

    def folders(depth: int) -> list[str]:
        """The folder of each image at a depth; empty for none."""
        found = []
        for container, place in paths.places.tolist():
            parts = str(paths.names[container][place]).split("/", depth + 1)
            found.append(parts[depth] if len(parts) > depth + 1 else "")
        return found

    found = folders(depth)
    while len(kinds := {*found}) == 1 and "" not in kinds:
        depth += 1
        found = folders(depth)
    if {"train"} < {SPLITS.get(name.lower(), "other") for name in kinds} <= {*_NAMES}:
        split = np.asarray([_NAMES.index(SPLITS[name.lower()]) for name in found], np.int8)
        found = folders(depth + 1)
    for image, name in enumerate(found):
        if name:
            labels[image] = number.setdefault(name, len(number))
    if len(number) < _LEAST or 2 * int((labels >= 0).sum()) <= len(paths):
        return labels, (), split
    return labels, tuple(number), split


def _image_set(paths: Sequence[Path], labels: np.ndarray, classes: tuple[str, ...]) -> ImageSet:
    if not classes:
        return ImageSet(paths, None, ())
    present = np.unique(labels).tolist()
    names = sorted_classes([classes[label] for label in present])
    number = {name: index for index, name in enumerate(names)}
    table = np.full(len(classes), -1, np.int32)
    table[present] = [number[classes[label]] for label in present]
    return ImageSet(paths, tuple(table[labels].tolist()), tuple(names))
