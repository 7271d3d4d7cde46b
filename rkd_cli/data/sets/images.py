"""Images without labels, in a folder and its subfolders."""

from __future__ import annotations

from pathlib import Path

from rkd_cli.data.sets.folder import read_trees, split_folders
from rkd_cli.data.sets.packed import is_packed, load_packed
from rkd_cli.data.splits import ImageSet, hold_out_photos
from rkd_cli.data.walk import Tree
from rkd_cli.errors import DataError
from rkd_cli.events import Reporter, silent


def load_images(root: str | Path, report: Reporter = silent) -> tuple[ImageSet, ImageSet]:
    """Training and evaluation split: those of ``split_folders``, or nine tenths and a tenth of all images."""
    root = Path(root)
    if is_packed(root):
        return load_packed(root, report, labeled=False)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder. --dataset images needs a folder of images, in subfolders or not.")
    parts = split_folders(root)
    first, *second = map(_read, read_trees(root, parts, report))
    return (first, second[0]) if second else hold_out_photos(first, root, "eval")


def _read(tree: Tree) -> ImageSet:
    paths = tree.images
    if not paths:
        raise DataError(f"{tree.root}: contains no images. Name another folder with --data.")
    return ImageSet(tuple(paths), None, ())
