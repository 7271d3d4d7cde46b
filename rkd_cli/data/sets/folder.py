"""Your own images in one folder per class."""

from __future__ import annotations

from collections import Counter
from filecmp import cmp
from pathlib import Path

from rkd_cli.data.extensions import EXTENSIONS
from rkd_cli.data.splits import ImageSet
from rkd_cli.data.walk import Tree, is_hidden, is_image, note_left_out, some, walk
from rkd_cli.errors import DataError
from rkd_cli.events import Note, Reporter, silent

# names of split folders, case-insensitive; of several evaluation splits the first in this order is read
_TRAIN = ("train", "training")
_EVALUATION = (("eval", "evaluation"), ("test", "testing"), ("val", "valid", "validation"))
_LAYOUT = (
    "--dataset folder needs one folder of images per class, or such folders inside train/ and eval/ (or test/, val/). "
    "For images without classes use --dataset images with `rkd distill`."
)


def load_folder(root: str | Path, report: Reporter = silent) -> tuple[ImageSet, ImageSet]:
    """Training and evaluation split: those of ``split_folders``, or the halves of the sorted class folders."""
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder. {_LAYOUT}")
    parts = split_folders(root)
    trees = read_trees(root, parts, report)
    groups = [class_images(tree) for tree in trees]
    if parts:
        for part, images in zip(parts, groups, strict=True):
            _check_count(part, len(images), 2)
    else:
        (images,) = groups
        _check_single_split(root, images)
        _check_count(root, len(images), 4, " (2 per split)")
        half = len(images) // 2
        groups = [dict(list(images.items())[:half]), dict(list(images.items())[half:])]
    train, evaluation = (_read(part, images) for part, images in zip(parts or (root, root), groups, strict=True))
    if parts:
        _compare(parts, groups[0], groups[1], report)
    for tree in trees:
        _note_loose(tree, report)
    for text in (_nested([tree.root for tree in trees], train, evaluation), single_note(train, evaluation)):
        if text:
            report(Note(f"{root}: {text}"))
    return train, evaluation


def split_folders(root: Path) -> tuple[Path, Path] | None:
    """The folders of the training and the evaluation split in a folder, by name; None if there are none."""
    folders = [path for path in _visible(root) if path.is_dir()]

    def named(names: tuple[str, ...]) -> list[Path]:
        return [folder for folder in folders if folder.name.casefold() in names]

    train, evaluation = named(_TRAIN), next((there for names in _EVALUATION if (there := named(names))), [])
    if not train or not evaluation:
        return None
    for one, *others in (train, evaluation):
        if others:
            raise DataError(f"{root}: {one.name}/ and {others[0].name}/ are the same split. Rename or remove one.")
    return train[0], evaluation[0]


def read_trees(root: Path, parts: tuple[Path, Path] | None, report: Reporter) -> list[Tree]:
    """Walk the split folders, or ``root``, and report files that are left out."""
    if parts:
        _note_unused(root, parts, report)
    trees = [walk(part) for part in parts or (root,)]
    note_left_out(root, report, *trees)
    return trees


def class_images(tree: Tree) -> dict[str, list[Path]]:
    """{class folder: its images}, both sorted; a link to a folder that is read anyway is not a class."""
    again = set(tree.again)
    folders = [path for path in _visible(tree.root) if path.is_dir() and str(path) not in again]
    found: dict[str, list[Path]] = {folder.name: [] for folder in folders}
    depth = len(tree.root.parts)
    for image in tree.images:
        if len(image.parts) > depth + 1:
            found[image.parts[depth]].append(image)
    return found


def _check_single_split(root: Path, images: dict[str, list[Path]]) -> None:
    """Raise a DataError if a class folder is really a split folder without the other split."""
    for name, paths in images.items():
        inner = {path.relative_to(root / name).parts[0] for path in paths}
        of_split = name.casefold() in (*_TRAIN, *(other for names in _EVALUATION for other in names))
        if of_split and len(inner) > 1 and all((root / name / part).is_dir() for part in inner):
            other = "eval/, test/ or val/" if name.casefold() in _TRAIN else "train/"
            raise DataError(
                f"{root / name}: contains class folders, but {root} contains no {other}. Add it, or pass --data "
                f"{root / name} to split its classes."
            )


def _check_count(root: Path, count: int, least: int, why: str = "") -> None:
    if count < least:
        raise DataError(f"{root}: {count} class folders, at least {least} are needed{why}. {_LAYOUT}")


def _read(root: Path, images: dict[str, list[Path]]) -> ImageSet:
    for name, paths in images.items():
        if not paths:
            raise DataError(f"{root / name}: class folder without images ({', '.join(EXTENSIONS)}). Fill or remove it.")
    labels = tuple(label for label, paths in enumerate(images.values()) for _ in paths)
    return ImageSet(tuple(path for paths in images.values() for path in paths), labels, tuple(images))


def _compare(
    parts: tuple[Path, Path], train: dict[str, list[Path]], evaluation: dict[str, list[Path]], report: Reporter
) -> None:
    """Raise a DataError if a class has equal files in both splits, and report classes that are in both."""
    first, second = parts
    common = [name for name in evaluation if name in train]
    for name in common:
        if _same_files((first, train[name]), (second, evaluation[name])):
            raise DataError(
                f"{first.parent}: class {name} has the same files in {first.name}/ and {second.name}/. Remove it from "
                f"one of them, or remove {first.name}/ and {second.name}/ and put the class folders into one folder to "
                "split the classes."
            )
    if common and len(common) == len(evaluation):
        report(
            Note(
                f"{first.parent}: all {len(common)} classes in {second.name}/ are in {first.name}/ too. The evaluation "
                "measures new images of known classes. To measure unseen classes, put all class folders into one "
                f"folder, without {first.name}/ and {second.name}/."
            )
        )
    elif common:
        count = f"{len(common)} of {len(evaluation)} classes in {second.name}/"
        report(Note(f"{count} are in {first.name}/ too: {some(common)}"))


def _same_files(*of: tuple[Path, list[Path]]) -> bool:
    names = [[path.relative_to(folder) for path in paths] for folder, paths in of]
    return names[0] == names[1] and all(cmp(*pair, shallow=False) for pair in zip(of[0][1], of[1][1], strict=True))


def _note_unused(root: Path, parts: tuple[Path, Path], report: Reporter) -> None:
    """Report folders and images next to the split folders, which are not read."""
    train, evaluation = parts
    others = [path for path in _visible(root) if path not in parts and (path.is_dir() or is_image(path.name))]
    if others:
        text = f"{root}: only {train.name}/ and {evaluation.name}/ are read, not {some([p.name for p in others])}"
        if any(path.name.casefold() in _EVALUATION[-1] for path in others):
            text += f" (--select-on val uses a part of {train.name}/ as the validation split)"
        report(Note(text))


def _note_loose(tree: Tree, report: Reporter) -> None:
    loose = [path.name for path in tree.images if path.parent == tree.root]
    if loose:
        report(Note(f"{tree.root}: {len(loose):,} images outside of class folders are left out: {some(loose)}"))


def _nested(parents: list[Path], *splits: ImageSet) -> str:
    """A note about folders inside class folders, which the user may have meant as classes."""
    inner = {path.parent: None for split in splits for path in split.paths if path.parent.parent not in parents}
    if not inner:
        return ""
    first = next(iter(inner))
    return f"{len(inner):,} folders inside class folders are not classes of their own, first {first}"


def single_note(*splits: ImageSet) -> str:
    """A note about classes with a single image; empty without any."""
    counts = [count for split in splits for count in Counter(split.labels or ()).values()]
    single = counts.count(1)
    if not single:
        return ""
    return (
        f"{single:,} of {len(counts):,} classes have a single image, which forms no pair. Add images, or distil "
        "without labels (--no-labels)."
    )


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not is_hidden(path.name, path.is_dir()))
