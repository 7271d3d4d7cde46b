"""Your own images: one folder a class."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from filecmp import cmp
from pathlib import Path

from rkd_cli.data.decode import EXTENSIONS, HEIC
from rkd_cli.data.splits import ImageSet
from rkd_cli.errors import DataError
from rkd_cli.events import Note, Reporter, silent

_HIDDEN = (".", "__")  # how the names of folders begin that hold no images of the user's
_NAMED = 3  # how many names a note has
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
        parents = [root / "train", root / "eval"]
    else:
        folders = _class_folders(root)
        if len(folders) < 4:
            raise DataError(f"{root}: {len(folders)} class folders, at least 4 are needed (2 a split): {_LAYOUT}")
        half = len(folders) // 2
        train, evaluation = _read(folders[:half]), _read(folders[half:])
        parents = [root]
    for parent in parents:
        _note_loose(parent, report)
    for text in (_nested(parents, train, evaluation), _single(train, evaluation)):
        if text:
            report(Note(f"{root}: {text}"))
    return train, evaluation


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
        known = f"{len(shared)} of {len(evaluation.classes)} classes in eval/ are in train/ too, not unseen"
        report(Note(f"{known}: {_some(shared)}"))


def _same_files(one: Path, other: Path) -> bool:
    images = [find_images(folder) for folder in (one, other)]
    names = [[path.relative_to(folder) for path in paths] for folder, paths in zip((one, other), images, strict=True)]
    return names[0] == names[1] and all(cmp(a, b, shallow=False) for a, b in zip(*images, strict=True))


def _class_folders(root: Path) -> list[Path]:
    return [path for path in _visible(root) if path.is_dir()]


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
    return sorted(Path(parent, name) for parent, name in _files(folder) if _is_image(name))


def note_unread(folder: Path, report: Reporter) -> None:
    """``note_other_files`` of a folder, and of what beside its train/ and eval/ is not read."""
    parts = [folder / "train", folder / "eval"]
    if all(part.is_dir() for part in parts):
        others = [path for path in _visible(folder) if path not in parts and (path.is_dir() or _is_image(path.name))]
        if others:
            report(Note(f"{folder}: train/ and eval/ alone are read, and not {_some([p.name for p in others])}"))
        note_other_files(folder, report, *parts)
    else:
        note_other_files(folder, report, folder)


def note_other_files(folder: Path, report: Reporter, *parts: Path) -> None:
    """Tell of the files below ``parts`` of a folder that are no images read here.

    Costs a second walk through the folder, a second or two for a million files.
    """
    unread = Counter(Path(name).suffix.lower() for part in parts for _, name in _files(part) if not _is_image(name))
    if heic := sum(unread.pop(suffix, 0) for suffix in HEIC):
        report(Note(f"{folder}: HEIC images are left out ({heic:,}): `pip install pillow-heif` to read them"))
    if unread:
        kinds = [f"{count:,} {suffix or 'without an ending'}" for suffix, count in unread.most_common()]
        report(Note(f"{folder}: files that are no images read here are left out: {_some(kinds)}"))


def _note_loose(root: Path, report: Reporter) -> None:
    loose = [path.name for path in _visible(root) if _is_image(path.name) and path.is_file()]
    if loose:
        report(
            Note(f"{root}: images beside the class folders, in no class, are left out ({len(loose):,}): {_some(loose)}")
        )


def _nested(parents: list[Path], *splits: ImageSet) -> str:
    """Whether the images of a class lie in folders within its own: perhaps years, and the classes are those folders."""
    inner = {path.parent: None for split in splits for path in split.paths if path.parent.parent not in parents}
    if not inner:
        return ""
    first = next(iter(inner))
    return f"folders within class folders are no classes of their own ({len(inner):,}, the first {first})"


def _single(*splits: ImageSet) -> str:
    counts = [count for split in splits for count in Counter(split.labels or ()).values()]
    single = counts.count(1)
    if not single:
        return ""
    return (
        f"classes of a single image ({single:,} of {len(counts):,}): it makes no pair and finds nothing: give each two "
        "or more, or distil without classes by --no-labels"
    )


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith(_HIDDEN))


def _some(names: list[str]) -> str:
    return ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)


def _files(folder: Path) -> Iterator[tuple[str, str]]:
    """(folder, name) of every file below a folder that is not hidden."""
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(_HIDDEN)]
        yield from ((parent, name) for name in names if not name.startswith("."))
