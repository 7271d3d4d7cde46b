"""Your own images: one folder a class."""

from __future__ import annotations

from collections import Counter
from filecmp import cmp
from pathlib import Path

from rkd_cli.data.decode import EXTENSIONS
from rkd_cli.data.splits import ImageSet
from rkd_cli.data.walk import Tree, is_hidden, is_image, note_left_out, some, walk
from rkd_cli.errors import DataError
from rkd_cli.events import Note, Reporter, silent

# how folders of splits are called, in any case; of several evaluation splits the first of these is read
_TRAIN = ("train", "training")
_EVALUATION = (("eval", "evaluation"), ("test", "testing"), ("val", "valid", "validation"))
_LAYOUT = (
    "--dataset folder wants one folder of images a class, or such folders inside train/ and eval/ (or test/, val/); "
    "photos without classes are --dataset images, for `rkd distill`"
)


def load_folder(root: Path, report: Reporter = silent) -> tuple[ImageSet, ImageSet]:
    """Training and evaluation split: those of ``split_folders``, or the halves of the sorted class folders.

    Raises:
        DataError: no such folder, too few classes, a class without images, or one whose files are in both splits.
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such folder: {_LAYOUT}")
    parts = split_folders(root)
    trees = read_trees(root, parts, report)
    groups = [class_images(tree) for tree in trees]
    if parts:
        for part, images in zip(parts, groups, strict=True):
            _check_count(part, len(images), 2)
    else:
        (images,) = groups
        _check_single_split(root, images)
        _check_count(root, len(images), 4, " (2 a split)")
        half = len(images) // 2
        groups = [dict(list(images.items())[:half]), dict(list(images.items())[half:])]
    train, evaluation = (_read(part, images) for part, images in zip(parts or (root, root), groups, strict=True))
    if parts:
        _compare(parts, groups[0], groups[1], report)
    for tree in trees:
        _note_loose(tree, report)
    for text in (_nested([tree.root for tree in trees], train, evaluation), _single(train, evaluation)):
        if text:
            report(Note(f"{root}: {text}"))
    return train, evaluation


def split_folders(root: Path) -> tuple[Path, Path] | None:
    """The folders of the training and the evaluation split in a folder, by their names; None: there are none.

    Raises:
        DataError: one of them is there under two names.
    """
    folders = [path for path in _visible(root) if path.is_dir()]

    def named(names: tuple[str, ...]) -> list[Path]:
        return [folder for folder in folders if folder.name.casefold() in names]

    train, evaluation = named(_TRAIN), next((there for names in _EVALUATION if (there := named(names))), [])
    if not train or not evaluation:
        return None
    for one, *others in (train, evaluation):
        if others:
            raise DataError(f"{root}: {one.name}/ and {others[0].name}/ both name one split: rename or remove one")
    return train[0], evaluation[0]


def read_trees(root: Path, parts: tuple[Path, Path] | None, report: Reporter) -> list[Tree]:
    """What lies below the folders of splits, or below ``root``; what is left out is told."""
    if parts:
        _note_beside(root, parts, report)
    trees = [walk(part) for part in parts or (root,)]
    note_left_out(root, report, *trees)
    return trees


def class_images(tree: Tree) -> dict[str, list[Path]]:
    """{class folder: the images below it}, both sorted; a link to a folder that is read anyway is no class."""
    again = set(tree.again)
    folders = [path for path in _visible(tree.root) if path.is_dir() and str(path) not in again]
    found: dict[str, list[Path]] = {folder.name: [] for folder in folders}
    depth = len(tree.root.parts)
    for image in tree.images:
        if len(image.parts) > depth + 1:
            found[image.parts[depth]].append(image)
    return found


def _check_single_split(root: Path, images: dict[str, list[Path]]) -> None:
    """That no class folder is the folder of a split without its counterpart."""
    for name, paths in images.items():
        inner = {path.relative_to(root / name).parts[0] for path in paths}
        of_split = name.casefold() in (*_TRAIN, *(other for names in _EVALUATION for other in names))
        if of_split and len(inner) > 1 and all((root / name / part).is_dir() for part in inner):
            other = "eval/, test/ or val/" if name.casefold() in _TRAIN else "train/"
            raise DataError(
                f"{root / name}: holds class folders, and beside it is no {other}: add that, or name {root / name} "
                "itself with --data, whose classes are then split"
            )


def _check_count(root: Path, count: int, least: int, why: str = "") -> None:
    if count < least:
        raise DataError(f"{root}: {count} class folders, at least {least} are needed{why}: {_LAYOUT}")


def _read(root: Path, images: dict[str, list[Path]]) -> ImageSet:
    for name, paths in images.items():
        if not paths:
            raise DataError(
                f"{root / name}: a class folder without images ({', '.join(EXTENSIONS)}): fill or remove it"
            )
    labels = tuple(label for label, paths in enumerate(images.values()) for _ in paths)
    return ImageSet(tuple(path for paths in images.values() for path in paths), labels, tuple(images))


def _compare(
    parts: tuple[Path, Path], train: dict[str, list[Path]], evaluation: dict[str, list[Path]], report: Reporter
) -> None:
    """Evaluation classes are called unseen: refuse a copy of a training class, and tell of one of the same name."""
    known, unseen = parts
    shared = [name for name in evaluation if name in train]
    for name in shared:
        if _same_files((known, train[name]), (unseen, evaluation[name])):
            raise DataError(
                f"{known.parent}: the class {name} has the same files in {known.name}/ and {unseen.name}/, where it is "
                f"to be unseen: keep it in one of them, or give the class folders without {known.name}/ and "
                f"{unseen.name}/, which are then split"
            )
    if shared and len(shared) == len(evaluation):
        report(
            Note(
                f"{known.parent}: all {len(shared)} classes in {unseen.name}/ are in {known.name}/ too, so what is "
                "measured is new images of known classes, not unseen classes. To measure those, put the class folders "
                f"side by side, without {known.name}/ and {unseen.name}/"
            )
        )
    elif shared:
        count = f"{len(shared)} of {len(evaluation)} classes in {unseen.name}/"
        report(Note(f"{count} are in {known.name}/ too, not unseen: {some(shared)}"))


def _same_files(*of: tuple[Path, list[Path]]) -> bool:
    names = [[path.relative_to(folder) for path in paths] for folder, paths in of]
    return names[0] == names[1] and all(cmp(*pair, shallow=False) for pair in zip(of[0][1], of[1][1], strict=True))


def _note_beside(root: Path, parts: tuple[Path, Path], report: Reporter) -> None:
    """Tell of what beside the folders of splits is not read."""
    train, evaluation = parts
    others = [path for path in _visible(root) if path not in parts and (path.is_dir() or is_image(path.name))]
    if others:
        text = f"{root}: {train.name}/ and {evaluation.name}/ alone are read, and not {some([p.name for p in others])}"
        if any(path.name.casefold() in _EVALUATION[-1] for path in others):
            text += f" (--select-on val holds out a part of {train.name}/)"
        report(Note(text))


def _note_loose(tree: Tree, report: Reporter) -> None:
    loose = [path.name for path in tree.images if path.parent == tree.root]
    if loose:
        what = "images beside the class folders, in no class, are left out"
        report(Note(f"{tree.root}: {what} ({len(loose):,}): {some(loose)}"))


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
    return sorted(path for path in folder.iterdir() if not is_hidden(path.name, path.is_dir()))
