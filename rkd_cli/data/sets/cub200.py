"""CUB-200-2011 (Wah et al., 2011) and data sets in its layout: three lists and a folder of images."""

from __future__ import annotations

from pathlib import Path

from rkd_cli.data.sets.listing import check_images, halves, read_lines
from rkd_cli.data.splits import ImageSet
from rkd_cli.errors import DataError
from rkd_cli.events import Reporter, silent

FOLDER = "CUB_200_2011"
_LISTS = ("images.txt", "image_class_labels.txt", "classes.txt")
_HOW = "Download it with `rkd download-cub --data {}`"


def load_cub200(root: Path, report: Reporter = silent) -> tuple[ImageSet, ImageSet]:
    """Training and evaluation split of ``root/CUB_200_2011`` (or ``root``): first and second half of the classes."""
    folder = root if (root / _LISTS[0]).is_file() else root / FOLDER
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder. {_HOW.format(root)}, or name another folder with --data.")
    return load_listed(folder, f"{_HOW.format(root)}.")


def find_cub200(root: Path) -> Path | None:
    """The folder of a data set in this layout in ``root``, if any."""
    if sum((root / name).is_file() for name in _LISTS) > 1:
        return root
    return root / FOLDER if (root / FOLDER).is_dir() else None


def check_cub(folder: Path) -> None:
    """Raise a DataError unless a CUB folder contains its lists and all images that they name."""
    load_listed(folder, f"{_HOW.format(folder.parent)}.")


def load_listed(folder: Path, remedy: str) -> tuple[ImageSet, ImageSet]:
    """Read ``images.txt``, ``image_class_labels.txt`` and ``classes.txt``, and split the classes in halves.

    ``remedy`` completes the error about a missing file.
    """
    names = _read_list(folder / "images.txt", remedy)
    class_of = _read_list(folder / "image_class_labels.txt", remedy)
    classes = _read_list(folder / "classes.txt", remedy)
    for image, name in names.items():
        if class_of.get(image) not in classes:
            raise DataError(
                f"{folder / 'image_class_labels.txt'}: image {image} ({name}) has no class in classes.txt. {remedy}"
            )
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
            raise DataError(
                f'{path}, line {number}: expected a new number and a text, got "{line.strip()[:80]}". {remedy}'
            )
        entries[key] = text
    if not entries:
        raise DataError(f"{path}: is empty. {remedy}")
    return entries
