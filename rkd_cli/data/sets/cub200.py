"""CUB-200-2011 (Wah et al., 2011) and any set in its layout: three lists beside a folder of images."""

from __future__ import annotations

from pathlib import Path

from rkd_cli.data.sets.listing import check_images, halves, read_lines
from rkd_cli.data.splits import ImageSet
from rkd_cli.errors import DataError
from rkd_cli.events import Reporter, silent

FOLDER = "CUB_200_2011"
_LISTS = ("images.txt", "image_class_labels.txt", "classes.txt")
_HOW = "fetch it with `rkd download-cub --data {}`"


def load_cub200(root: Path, report: Reporter = silent) -> tuple[ImageSet, ImageSet]:
    """Training and evaluation split of ``root/CUB_200_2011`` (or of ``root`` itself): first and second half of classes.

    Raises:
        DataError: the set is not there, or lists and files disagree.
    """
    folder = root if (root / _LISTS[0]).is_file() else root / FOLDER
    if not folder.is_dir():
        raise DataError(f"{folder}: no CUB-200-2011 there: {_HOW.format(root)}, or name another place with --data")
    return load_listed(folder, _HOW.format(root))


def find_cub200(root: Path) -> Path | None:
    """Where in ``root`` a set in this layout is."""
    if sum((root / name).is_file() for name in _LISTS) > 1:
        return root
    return root / FOLDER if (root / FOLDER).is_dir() else None


def check_cub(folder: Path) -> None:
    """Make sure that a CUB folder holds its lists and every image that they name.

    Raises:
        DataError: something is missing.
    """
    load_listed(folder, _HOW.format(folder.parent))


def load_listed(folder: Path, remedy: str) -> tuple[ImageSet, ImageSet]:
    """Read ``images.txt``, ``image_class_labels.txt`` and ``classes.txt``, and split the classes in halves.

    Args:
        folder: holds the lists and ``images/``.
        remedy: what to do about a missing file, for the error.
    Raises:
        DataError: a list is missing or malformed, or a listed image is not on disk.
    """
    names = _read_list(folder / "images.txt", remedy)
    class_of = _read_list(folder / "image_class_labels.txt", remedy)
    classes = _read_list(folder / "classes.txt", remedy)
    for image, name in names.items():
        if class_of.get(image) not in classes:
            raise DataError(f"{folder / 'image_class_labels.txt'}: image {image} ({name}) has no class of classes.txt")
    check_images(folder / "images", [Path(name) for name in names.values()], remedy)
    order = {number: position for position, number in enumerate(classes)}
    members = [(Path(name), order[class_of[image]]) for image, name in names.items()]
    return halves(folder / "images", members, tuple(classes.values()))


def _read_list(path: Path, remedy: str) -> dict[str, str]:
    """{number: text} of a file of "number text" lines."""
    entries: dict[str, str] = {}
    for number, line in enumerate(read_lines(path, remedy), 1):
        key, _, text = line.strip().partition(" ")
        if not key:
            continue
        if not text or key in entries:
            raise DataError(f'{path}, line {number}: expected a new number and a text, got "{line.strip()[:80]}"')
        entries[key] = text
    if not entries:
        raise DataError(f"{path}: empty: {remedy}")
    return entries
