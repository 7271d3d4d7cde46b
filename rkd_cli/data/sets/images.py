"""Photos without labels: any tree of pictures, or a flat folder."""

from __future__ import annotations

from pathlib import Path

from rkd_cli.data.sets.folder import find_images, note_unread
from rkd_cli.data.splits import ImageSet, hold_out_photos
from rkd_cli.errors import DataError
from rkd_cli.events import Reporter, silent


def load_images(root: Path, report: Reporter = silent) -> tuple[ImageSet, ImageSet]:
    """Training and evaluation split: ``root/train`` and ``root/eval``, or all pictures but a tenth, and that tenth.

    Raises:
        DataError: no such folder, or too few pictures.
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such folder: --dataset images wants a folder of pictures, in folders or not")
    note_unread(root, report)
    if (root / "train").is_dir() and (root / "eval").is_dir():
        return _read(root / "train"), _read(root / "eval")
    return hold_out_photos(_read(root), root, "eval")


def _read(root: Path) -> ImageSet:
    paths = find_images(root)
    if not paths:
        raise DataError(f"{root}: no pictures in it or in its folders: name another with --data")
    return ImageSet(tuple(paths), None, ())
