"""``--dataset auto``: detect the data set in a folder from its layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rkd_cli.data.extensions import EXTENSIONS
from rkd_cli.data.sets import demo
from rkd_cli.data.sets.cars196 import find_cars196
from rkd_cli.data.sets.cub200 import FOLDER, find_cub200
from rkd_cli.data.sets.folder import class_images, split_folders
from rkd_cli.data.sets.lists import SUFFIXES, is_list
from rkd_cli.data.sets.packed import is_packed
from rkd_cli.data.sets.reid import find_inshop, find_market1501, find_msmt17, find_veri776
from rkd_cli.data.sets.sop import find_sop
from rkd_cli.data.walk import find_images, walk
from rkd_cli.errors import DataError
from rkd_cli.events import Note, Reporter, silent

_LEAST = 4  # class folders, two per split

_WHAT = {
    "cub200": "a data set in the layout of CUB-200-2011",
    "cars196": "Cars196",
    "sop": "Stanford Online Products",
    "inshop": "In-Shop Clothes Retrieval",
    "market1501": "a data set in the layout of Market-1501",
    "msmt17": "MSMT17",
    "veri776": "VeRi-776",
    "demo": "the demo data set",
    "folder": "class folders",
    "images": "images without classes",
    "list": "a list of images",
    "packed": "images in archives or tables",
}

# data sets with their own layout; demo is last, because its folder may be next to another data set
_OWN_LAYOUT: dict[str, Callable[[Path], Path | None]] = {
    "cub200": find_cub200,
    "cars196": find_cars196,
    "sop": find_sop,
    "inshop": find_inshop,
    "market1501": find_market1501,
    "msmt17": find_msmt17,
    "veri776": find_veri776,
    "demo": demo.find_demo,
}


def find_dataset(root: Path, report: Reporter = silent) -> str:
    """The name of the data set in a folder, after a note about it.

    Args:
        root: the folder or list, as for ``--data``.
        report: receives the note.
    Raises:
        DataError: there is no such folder, or it contains no known data set, or several.
    """
    name, reason = _find(root)
    report(Note(f"{root}: found {_WHAT[name]} (--dataset {name}){reason}"))
    return name


def _find(root: Path) -> tuple[str, str]:
    """The name of a data set, and perhaps why it is not another."""
    if is_list(root):
        return "list", ""
    if not root.is_dir() and is_packed(root):
        return "packed", ""
    found = _own_layouts(root)
    published = [name for name in found if name != "demo"]
    if len(published) > 1:
        raise DataError(f"{root}: contains {' and '.join(published)}. Name one of them with --dataset.")
    if found:
        return found[0], ""
    how = f"`rkd download-cub --data {root}` downloads CUB-200-2011, and --dataset demo draws images."
    if root.is_file():
        raise DataError(f"{root}: is no list of images ({', '.join(SUFFIXES)}). Name one, or a folder, with --data.")
    if not root.is_dir():
        raise DataError(f"{root}: no such folder. Name the folder of your images with --data. {how}")
    if (own := _own_images(root))[0]:
        return own
    if is_packed(root):
        return "packed", ""
    others = [path for path in root.iterdir() if not path.name.startswith((".", FOLDER))]
    raise DataError(
        f"{root}: contains no images and no known data set. Looked for images ({', '.join(EXTENSIONS)}), class "
        f"folders, {FOLDER}/ or its images.txt, car_ims/ or cars_train/, Ebay_train.txt, demo-birds/, "
        "list_eval_partition.txt, bounding_box_train/, list_gallery.txt, name_query.txt."
        + ("" if others else f" {how}")
    )


def may_hold(name: str, root: Path) -> bool:
    """Whether a folder or list may contain this data set: it has its layout, or no data set's own layout."""
    if is_list(root) or is_packed(root):
        return name in (("list",) if is_list(root) else ("packed", "images"))
    return name in (_own_layouts(root) or ("folder", "images", "demo"))


def _own_layouts(root: Path) -> list[str]:
    return [name for name, find in _OWN_LAYOUT.items() if find(root)]


def _own_images(root: Path) -> tuple[str, str]:
    """folder if most images are in class folders, else images, and perhaps why; empty without images."""
    parts = split_folders(root)
    trees = [walk(part) for part in parts or (root,)]
    groups = [[paths for paths in class_images(tree).values() if paths] for tree in trees]
    inside = sum(len(paths) for group in groups for paths in group)
    count = sum(len(tree.images) for tree in trees)
    folders = min(map(len, groups)) * len(groups)
    few = ""
    if folders and 2 * inside > count:
        if folders >= _LEAST:
            return "folder", ""
        few = f"; to use folders as classes, {_LEAST} are needed, and there are {folders}"
    return ("images" if count or find_images(root) else ""), few


def image_folders(name: str, root: Path) -> tuple[Path, ...]:
    """The folders that contain the images of a data set; none for a list or archives, which may be anywhere."""
    if name == "list" or is_packed(root):
        return ()
    if name == "demo":
        return (root / demo.FOLDER,)
    if name in _OWN_LAYOUT:
        return (_OWN_LAYOUT[name](root) or root,)
    return (split_folders(root) if root.is_dir() else None) or (root,)
