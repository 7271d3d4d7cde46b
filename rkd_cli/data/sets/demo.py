"""The demo data set: JPEG drawings of ``birds`` in the layout of CUB-200-2011."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from rkd_cli.data.sets.birds import ADJECTIVES, FAMILIES, VERSION, draw_bird, make_species
from rkd_cli.data.sets.cub200 import load_listed
from rkd_cli.data.splits import ImageSet
from rkd_cli.errors import DataError, RunError, SettingsError
from rkd_cli.events import Progress, Reporter, silent
from rkd_cli.runtime.files import atomic_write, locked, remove_partials

FOLDER = "demo-birds"
OURS = {"demo.json", "images", "images.txt", "image_class_labels.txt", "classes.txt"}


def make_demo(root: Path, *, species: int = 80, images: int = 32, size: int = 80, report: Reporter = silent) -> Path:
    """Draw the data set into the folder ``root`` atomically, unless it exists already; returns ``root``.

    It has ``species`` classes of ``images`` images with ``size`` pixels a side.
    """
    most = len(ADJECTIVES) * len(FAMILIES)
    if not (2 <= species <= most and images >= 1 and size >= 8):
        raise SettingsError(f"the demo data set needs 2 to {most} species, 1 or more images, and 8 or more pixels.")
    stamp = {"version": VERSION, "species": species, "images": images, "size": size}
    target = root.resolve()
    if _stamp_of(target) == stamp:
        return root
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(target):
            if _stamp_of(target) != stamp:  # another process may have drawn it meanwhile
                remove_partials(target)
                with atomic_write(target) as drawn:
                    _write(drawn, stamp, report)
    except OSError as error:
        raise RunError(f"{root}: the demo data set cannot be written ({error}). Name another folder.") from error
    return root


def load_demo(root: Path, report: Reporter = silent) -> tuple[ImageSet, ImageSet]:
    """Training and evaluation split of the data set in ``root/demo-birds``, which is drawn if it is missing."""
    folder = make_demo(root / FOLDER, report=report)
    return load_listed(folder, f"Remove {folder} to draw it again.")


def find_demo(root: Path) -> Path | None:
    """The folder of the data set in ``root``, if any."""
    return root / FOLDER if (root / FOLDER / "demo.json").is_file() else None


def _stamp_of(target: Path) -> dict[str, Any] | None:
    """The stamp of the data set at ``target``, None if there is nothing; a DataError for other files."""
    entries = {path.name for path in target.iterdir()} if target.is_dir() else {""}
    if not entries or not target.exists():
        return None
    try:
        stamp = json.loads((target / "demo.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        stamp = None
    if not isinstance(stamp, dict) or "species" not in stamp or entries - OURS:
        raise DataError(f"{target}: contains other files than the demo data set. Name another folder.")
    return stamp


def _write(root: Path, stamp: dict[str, int], report: Reporter) -> None:
    species, images = stamp["species"], stamp["images"]
    paths: list[str] = []
    kinds = [make_species(index) for index in range(species)]
    folders = [f"{number:03d}.{kind.name.replace(' ', '_')}" for number, kind in enumerate(kinds, 1)]
    for index, (kind, folder) in enumerate(zip(kinds, folders, strict=True)):
        (root / "images" / folder).mkdir(parents=True)
        for image in range(images):
            rng = random.Random(f"rkd demo {VERSION} species {index} image {image}")
            paths.append(f"{folder}/{folder[4:]}_{image + 1:04d}.jpg")
            picture = draw_bird(kind, rng, stamp["size"])
            picture.save(root / "images" / paths[-1], quality=90)
        report(Progress(what="Drawing", done=len(paths), total=species * images, unit="images"))
    labels = [str(index // images + 1) for index in range(len(paths))]
    for name, lines in (("images", paths), ("image_class_labels", labels), ("classes", folders)):
        text = "".join(f"{number} {line}\n" for number, line in enumerate(lines, 1))
        (root / f"{name}.txt").write_text(text, encoding="utf-8", newline="\n")
    (root / "demo.json").write_text(json.dumps(stamp) + "\n", encoding="utf-8")
