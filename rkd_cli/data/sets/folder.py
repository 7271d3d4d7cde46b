"""Your own images: one folder a class."""

from __future__ import annotations

import os
from pathlib import Path

from rkd_cli.data.images import ImageSet
from rkd_cli.errors import DataError
from rkd_cli.events import Reporter, silent

_EXTENSIONS = (
    ".jpg",
    ".jpeg",
    ".png",
    ".ppm",
    ".bmp",
    ".pgm",
    ".tif",
    ".tiff",
    ".webp",
)  # torchvision's list
_LAYOUT = "--dataset folder wants one folder of images a class, or such folders inside train/ and eval/"


def load_folder(root: Path, report: Reporter = silent) -> tuple[ImageSet, ImageSet]:
    """Training and evaluation split: ``root/train`` and ``root/eval``, or the halves of the sorted class folders.

    Raises:
        DataError: no such folder, too few classes, or a class without images.
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such folder: {_LAYOUT}")
    if (root / "train").is_dir() and (root / "eval").is_dir():
        return _read_classes(root / "train"), _read_classes(root / "eval")
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


def _class_folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith((".", "__")))


def _read(folders: list[Path]) -> ImageSet:
    paths: list[Path] = []
    labels: list[int] = []
    for label, folder in enumerate(folders):
        images = sorted(
            Path(parent, name)
            for parent, _, names in os.walk(folder)
            for name in names
            if name.lower().endswith(_EXTENSIONS) and not name.startswith(".")
        )
        if not images:
            raise DataError(f"{folder}: a class folder without images ({', '.join(_EXTENSIONS)}): fill or remove it")
        paths += images
        labels += [label] * len(images)
    return ImageSet(tuple(paths), tuple(labels), tuple(folder.name for folder in folders))
