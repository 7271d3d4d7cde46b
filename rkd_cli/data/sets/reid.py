"""Sets with queries and a gallery, in their published layouts.

Market-1501 (Zheng et al., 2015) and DukeMTMC-reID, MSMT17 (Wei et al., 2018), VeRi-776 (Liu et al., 2016) and In-Shop
(Liu et al., 2016).
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rkd_cli.data.sets.listing import Listed, check_images, image_set, read_lines
from rkd_cli.data.splits import ImageSet, Role
from rkd_cli.data.walk import is_image
from rkd_cli.errors import DataError, first_line
from rkd_cli.events import Note, Reporter, silent

_REMEDY = "Get it from another copy of the data set, or name another folder with --data."
_NAME = re.compile(r"(-1|\d+)_c(\d+)")  # of Market-1501, DukeMTMC-reID and VeRi-776: identity and camera
_ROLES: tuple[Role, Role] = ("query", "gallery")
_MARKET = ("bounding_box_train", "query", "bounding_box_test")
_VERI = (("image_train", "name_train.txt"), ("image_query", "name_query.txt"), ("image_test", "name_test.txt"))
_MSMT = ("list_train.txt", "list_val.txt", "list_query.txt", "list_gallery.txt")
_MSMT_FOLDERS = (("train", "mask_train_v2"), ("test", "mask_test_v2"))  # of version 1 and 2
_PARTITION = "list_eval_partition.txt"
_PARTITIONS = (_PARTITION, f"Eval/{_PARTITION}")
_IN_SHOP = ("", "In-shop Clothes Retrieval Benchmark", "In-Shop", "inshop")


def load_market1501(root: Path, report: Reporter = silent) -> tuple[ImageSet, ImageSet]:
    """Training images, and queries and gallery, of Market-1501 or DukeMTMC-reID: identity and camera are in the names.

    Junk (identity -1) counts for nobody and is left out. Distractors (identity 0000) are in the gallery.
    """
    folder = _found(find_market1501(root), root, f"{', '.join(f'{name}/' for name in _MARKET)}")
    train, queries, gallery = (
        [
            _parsed(folder / name, image.relative_to(folder))
            for image in sorted((folder / name).iterdir())
            if is_image(image.name)
        ]
        for name in _MARKET
    )
    wanted = [image for image in gallery if image.label != "-1"]
    if junk := len(gallery) - len(wanted):
        report(Note(f"{folder / _MARKET[2]}: {junk:,} junk images with the identity -1 are left out"))
    return _trained(folder, train), _asked(folder, queries, wanted)


def load_veri776(root: Path, report: Reporter = silent) -> tuple[ImageSet, ImageSet]:
    """Training images, and queries and gallery, of VeRi-776: ``name_*.txt``; train_label.xml, if there, must agree."""
    folder = _found(find_veri776(root), root, ", ".join(f"{name}/ with {names}" for name, names in _VERI))
    train, queries, gallery = (
        [_parsed(folder / names, Path(images) / name) for name in _lines(folder / names)] for images, names in _VERI
    )
    for name, images in (("train_label.xml", train), ("test_label.xml", gallery)):
        if (folder / name).is_file():
            _check_labels(folder / name, images)
    return _trained(folder, train), _asked(folder, queries, gallery)


def load_msmt17(root: Path, report: Reporter = silent) -> tuple[ImageSet, ImageSet]:
    """Training images, and queries and gallery, of MSMT17 by its four lists; list_val.txt is the validation split.

    Training and test identities are numbered from 0 each, so that those of the test begin with "test-".
    """
    folder = _found(find_msmt17(root), root, f"{', '.join(_MSMT)}, and train/ and test/")
    halves = [next((part for part in names if (folder / part).is_dir()), names[0]) for names in _MSMT_FOLDERS]
    train, val, queries, gallery = (_msmt(folder / name, halves[place // 2]) for place, name in enumerate(_MSMT))
    named_val = replace(_trained(folder, val), name="val") if val else None
    return replace(_trained(folder, train), val=named_val), _asked(folder, queries, gallery, "test-")


def load_inshop(root: Path, report: Reporter = silent) -> tuple[ImageSet, ImageSet]:
    """Training images, and queries and gallery, of In-Shop Clothes Retrieval by list_eval_partition.txt."""
    folder = _found(find_inshop(root), root, f"{_PARTITION} (or Eval/{_PARTITION}) and img/ (or Img/img/)")
    path = next(path for place in _PARTITIONS if (path := folder / place).is_file())
    folder = folder if (folder / "img").is_dir() else folder / "Img"
    parts: dict[str, list[Listed]] = {"train": [], "query": [], "gallery": []}
    for line, text in enumerate(read_lines(path, _REMEDY), 1):
        fields = text.split()
        if not fields or (line == 1 and len(fields) == 1) or fields[0] == "image_name":
            continue
        if len(fields) != 3 or fields[2] not in parts:
            raise DataError(
                f'{path}, line {line}: expected "image_name item_id train|query|gallery", got "{text[:80]}". {_REMEDY}'
            )
        parts[fields[2]].append(Listed(Path(fields[0]), fields[1], line=line))
    return _trained(folder, parts["train"]), _asked(folder, parts["query"], parts["gallery"])


def find_market1501(root: Path) -> Path | None:
    """The folder of the data set, if any."""
    return root if all((root / name).is_dir() for name in _MARKET) else None


def find_veri776(root: Path) -> Path | None:
    """The folder of the data set, if any."""
    return root if all((root / name).is_file() for _, name in _VERI) else None


def find_msmt17(root: Path) -> Path | None:
    """The folder of the data set, if any."""
    return root if all((root / name).is_file() for name in _MSMT) else None


def find_inshop(root: Path) -> Path | None:
    """The folder of the data set, in ``root`` or a usual subfolder, if any."""
    folders = (root / name for name in _IN_SHOP)
    return next((folder for folder in folders for place in _PARTITIONS if (folder / place).is_file()), None)


def _found(path: Path | None, root: Path, layout: str) -> Path:
    if path is None:
        raise DataError(f"{root}: does not hold {layout}. Name the folder that does with --data.")
    return path


def _trained(folder: Path, listed: Sequence[Listed]) -> ImageSet:
    return image_set(_checked(folder, listed, "training images"))


def _asked(folder: Path, queries: Sequence[Listed], gallery: Sequence[Listed], prefix: str = "") -> ImageSet:
    parts = _checked(folder, queries, "queries"), _checked(folder, gallery, "gallery images")
    listed = [image._replace(role=role) for role, part in zip(_ROLES, parts, strict=True) for image in part]
    return replace(image_set(listed, prefix), name="eval")


def _checked(folder: Path, listed: Sequence[Listed], what: str) -> list[Listed]:
    """``listed``, relative to ``folder``, with whole paths of existing files."""
    if not listed:
        raise DataError(f"{folder}: has no {what}. {_REMEDY}")
    check_images(folder, [image.path for image in listed], _REMEDY)
    return [image._replace(path=folder / image.path) for image in listed]


def _parsed(where: Path, path: Path) -> Listed:
    """An image with identity and camera from its name."""
    match = _NAME.match(path.name)
    if not match:
        raise DataError(f"{where}: {path.name} does not begin with identity and camera, such as 0002_c1. {_REMEDY}")
    return Listed(path, match[1], camera=match[2])


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in read_lines(path, _REMEDY) if line.strip()]


def _msmt(path: Path, half: str) -> list[Listed]:
    """The images of a list of "0000/0000_000_01_....jpg 0" lines: path, identity; the camera is in the name."""
    listed = []
    for line, text in enumerate(map(str.strip, read_lines(path, _REMEDY)), 1):
        name, _, identity = text.rpartition(" ")
        camera = [*Path(name).name.split("_"), "", "", ""][2]
        if text and not (identity.isdecimal() and camera.isdecimal()):
            raise DataError(f'{path}, line {line}: expected "0/0_000_01_....jpg 0", got "{text[:80]}". {_REMEDY}')
        if text:
            listed.append(Listed(Path(half, name), identity, camera=camera, line=line))
    return listed


def _check_labels(path: Path, images: Sequence[Listed]) -> None:
    """Raise a DataError if a label file of VeRi-776 contradicts a name."""
    try:
        text = path.read_bytes().decode("gb2312", errors="replace")
        items = ET.fromstring(re.sub(r"^\s*<\?xml.*?\?>", "", text)).iter("Item")
        facts = {str(i.get("imageName")): (str(i.get("vehicleID")), str(i.get("cameraID"))) for i in items}
    except ET.ParseError as error:
        raise DataError(f"{path}: not XML ({first_line(error)}). {_REMEDY}") from None
    for image in images:
        said = facts.get(image.path.name)
        if said and said != (image.label, f"c{image.camera}"):
            raise DataError(f"{path}: {image.path.name} has vehicle {said[0]} and camera {said[1]}. {_REMEDY}")
