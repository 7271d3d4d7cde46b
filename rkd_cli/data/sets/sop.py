"""Stanford Online Products (Song et al., 2016): two lists of images with disjoint classes."""

from __future__ import annotations

from pathlib import Path

from rkd_cli.data.sets.listing import check_images, read_lines
from rkd_cli.data.splits import ImageSet
from rkd_cli.errors import DataError
from rkd_cli.events import Reporter, silent

_FOLDER = "Stanford_Online_Products"
_HEADER = ["image_id", "class_id", "super_class_id", "path"]
_ADDRESS = "ftp://cs.stanford.edu/cs/cvgl/Stanford_Online_Products.zip"
_LAYOUT = "Ebay_train.txt, Ebay_test.txt and bicycle_final/*.JPG, cabinet_final/*.JPG, ..."
_REMEDY = "Get it from another copy of Stanford Online Products."


def load_sop(root: Path, report: Reporter = silent) -> tuple[ImageSet, ImageSet]:
    """Training and evaluation split of ``root/Stanford_Online_Products`` (or ``root``): its two lists."""
    folder = find_sop(root)
    if folder is None:
        raise DataError(
            f"{root / _FOLDER}: no such folder, and the official URL ({_ADDRESS}) is dead. Get a copy elsewhere, and "
            f"arrange it as {_LAYOUT}. Or name another folder with --data."
        )
    train = _read_list(folder / "Ebay_train.txt")
    evaluation = _read_list(folder / "Ebay_test.txt")
    trained = {class_id for class_id, _ in train}
    shared = next((class_id for class_id, _ in evaluation if class_id in trained), None)
    if shared is not None:
        raise DataError(f"{folder}: class {shared} is in both Ebay_train.txt and Ebay_test.txt. {_REMEDY}")
    check_images(folder, [name for _, name in train + evaluation], _REMEDY)
    return _image_set(folder, train), _image_set(folder, evaluation)


def find_sop(root: Path) -> Path | None:
    """The folder of the data set in ``root``, if any."""
    if (root / "Ebay_train.txt").is_file():
        return root
    return root / _FOLDER if (root / _FOLDER).is_dir() else None


def _read_list(path: Path) -> list[tuple[int, Path]]:
    """(class, image) of each line."""
    entries: list[tuple[int, Path]] = []
    for number, line in enumerate(read_lines(path, _REMEDY), 1):
        fields = line.strip().split(maxsplit=3)
        if not fields or (number == 1 and fields == _HEADER):
            continue
        try:
            _, class_id, _ = map(int, fields[:3])
            entries.append((class_id, Path(fields[3])))
        except (ValueError, IndexError):
            raise DataError(
                f'{path}, line {number}: expected "{" ".join(_HEADER)}", got "{line.strip()[:80]}". {_REMEDY}'
            ) from None
    if not entries:
        raise DataError(f"{path}: lists no images. {_REMEDY}")
    return entries


def _image_set(folder: Path, entries: list[tuple[int, Path]]) -> ImageSet:
    titles: dict[int, str] = {}  # in the order of the list
    for class_id, name in entries:
        if class_id not in titles:
            titles[class_id] = f"{class_id}.{name.parent}"
    position = {class_id: label for label, class_id in enumerate(titles)}
    paths = tuple(folder / name for _, name in entries)
    return ImageSet(paths, tuple(position[class_id] for class_id, _ in entries), tuple(titles.values()))
