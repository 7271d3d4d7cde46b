"""Your own images: one folder a class."""

from __future__ import annotations

import os
from filecmp import cmp
from pathlib import Path

from rkd_cli.data.decode import EXTENSIONS, HEIC
from rkd_cli.data.splits import ImageSet
from rkd_cli.errors import DataError
from rkd_cli.events import Note, Reporter, silent

_HIDDEN = (".", "__")  # how the names of folders begin that hold no images of the user's
_NAMED = 3  # how many classes a note names
_LAYOUT = "--dataset folder wants one folder of images a class, or such folders inside train/ and eval/"


def load_folder(root: Path, report: Reporter = silent) -> tuple[ImageSet, ImageSet]:
    """Training and evaluation split: ``root/train`` and ``root/eval``, or the halves of the sorted class folders.

    Raises:
        DataError: no such folder, too few classes, a class without images, or one whose files are in both splits.
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such folder: {_LAYOUT}")
    note_unread(root, report)
    if (root / "train").is_dir() and (root / "eval").is_dir():
        train, evaluation = _read_classes(root / "train"), _read_classes(root / "eval")
        _compare(root, train, evaluation, report)
        return train, evaluation
    folders = _class_folders(root)
    if len(folders) < 4:
        raise DataError(f"{root}: {len(folders)} class folders, at least 4 are needed (2 a split): {_LAYOUT}")
    half = len(folders) // 2
    return _read(folders[:half]), _read(folders[half:])


def _read_classes(root: Path) -> ImageSet:
    folders = _class_folders(root)
    if len(folders) < 2:
        raise DataError(f"{root}: {len(folders)} class folders, at least 2 are needed: {_LAYOUT}")
    return _read(folders)


def _compare(root: Path, train: ImageSet, evaluation: ImageSet, report: Reporter) -> None:
    """Evaluation classes are called unseen: refuse a copy of a training class, and tell of one of the same name."""
    shared = sorted({*train.classes} & {*evaluation.classes})
    for name in shared:
        if _same_files(root / "train" / name, root / "eval" / name):
            raise DataError(
                f"{root}: the class {name} has the same files in train/ and eval/, where it is to be unseen: keep it "
                "in one of them, or give the class folders without train/ and eval/, which are then split"
            )
    if shared:
        some = ", ".join(shared[:_NAMED]) + (", ..." if len(shared) > _NAMED else "")
        report(
            Note(f"{len(shared)} of {len(evaluation.classes)} classes in eval/ are in train/ too, not unseen: {some}")
        )


def _same_files(one: Path, other: Path) -> bool:
    images = [find_images(folder) for folder in (one, other)]
    names = [[path.relative_to(folder) for path in paths] for folder, paths in zip((one, other), images, strict=True)]
    return names[0] == names[1] and all(cmp(a, b, shallow=False) for a, b in zip(*images, strict=True))


def _class_folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith(_HIDDEN))


def _read(folders: list[Path]) -> ImageSet:
    paths: list[Path] = []
    labels: list[int] = []
    for label, folder in enumerate(folders):
        images = find_images(folder)
        if not images:
            raise DataError(f"{folder}: a class folder without images ({', '.join(EXTENSIONS)}): fill or remove it")
        paths += images
        labels += [label] * len(images)
    return ImageSet(tuple(paths), tuple(labels), tuple(folder.name for folder in folders))


def find_images(folder: Path) -> list[Path]:
    """The images below a folder, sorted; what is hidden (a name that begins with a dot or with __) is passed by."""
    return _find(folder, EXTENSIONS)


def note_unread(folder: Path, report: Reporter) -> None:
    """Tell of photos in the form of Apple's phones that nothing here reads."""
    unread = [] if set(HEIC) <= set(EXTENSIONS) else _find(folder, HEIC)
    if unread:
        report(Note(f"{folder}: HEIC images are left out ({len(unread):,}): `pip install pillow-heif` to read them"))


def _find(folder: Path, extensions: tuple[str, ...]) -> list[Path]:
    found: list[Path] = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(_HIDDEN)]
        found += [
            Path(parent, name) for name in names if name.lower().endswith(extensions) and not name.startswith(".")
        ]
    return sorted(found)
