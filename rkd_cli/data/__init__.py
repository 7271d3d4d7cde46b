"""Data sets, their splits, and the batch samplers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from rkd_cli.data.decode import Decoding
from rkd_cli.data.found import find_dataset
from rkd_cli.data.sampler import BalancedBatchSampler, UniformBatchSampler
from rkd_cli.data.sets.cars196 import load_cars196
from rkd_cli.data.sets.cub200 import load_cub200
from rkd_cli.data.sets.demo import load_demo
from rkd_cli.data.sets.folder import load_folder
from rkd_cli.data.sets.images import load_images
from rkd_cli.data.sets.lists import load_list
from rkd_cli.data.sets.packed import load_packed
from rkd_cli.data.sets.reid import load_inshop, load_market1501, load_msmt17, load_veri776
from rkd_cli.data.sets.sop import load_sop
from rkd_cli.data.splits import ImageSet, hold_out, hold_out_photos
from rkd_cli.errors import DataError
from rkd_cli.events import Note, Reporter, silent
from rkd_cli.schemas import PUBLISHED

__all__ = [
    "DATASETS",
    "BalancedBatchSampler",
    "ImageSet",
    "UniformBatchSampler",
    "find_dataset",
    "hold_out",
    "hold_out_photos",
    "load_dataset",
    "load_folder",
]

DATASETS: dict[str, Callable[[Path, Reporter], tuple[ImageSet, ImageSet]]] = {
    "cub200": load_cub200,
    "cars196": load_cars196,
    "sop": load_sop,
    "inshop": load_inshop,
    "market1501": load_market1501,
    "msmt17": load_msmt17,
    "veri776": load_veri776,
    "folder": load_folder,
    "images": load_images,
    "list": load_list,
    "packed": load_packed,
    "demo": load_demo,
}


def load_dataset(name: str, root: str | Path, report: Reporter = silent) -> tuple[ImageSet, ImageSet]:
    """Load the splits ``train`` and ``eval`` of a data set.

    Args:
        name: as for ``--dataset``; auto detects the data set.
        root: as for ``--data``.
        report: receives notes.
    Raises:
        DataError: an unknown name, or a data set that is missing or damaged.
        RunError: the demo data set cannot be written.
    """
    root = Path(root)
    name = find_dataset(root, report) if name == "auto" else name
    if name not in DATASETS:
        raise DataError(f"{name}: unknown data set. Use one of {', '.join(DATASETS)}.")
    train, evaluation = DATASETS[name](root, report)
    old = root / ".rkd-cache"  # of older versions
    if old.is_dir():
        report(Note(f"{old}: cache of an older version, no longer used. You can delete it."))
    boxes = {path: box for part in (*train.parts, evaluation) for path, box in part.decoding.boxes.items()}
    decoding = Decoding(published=name in PUBLISHED, boxes=boxes)
    val = train.val and replace(train.val, decoding=decoding)
    train = replace(train, name="train", decoding=decoding, val=val)
    return train, replace(evaluation, name="eval", decoding=decoding)
