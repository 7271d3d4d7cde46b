"""Data sets, their splits, and the balanced batch sampler."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rkd_cli.data.images import ImageSet
from rkd_cli.data.sampler import BalancedBatchSampler
from rkd_cli.data.sets.cars196 import load_cars196
from rkd_cli.data.sets.cub200 import load_cub200
from rkd_cli.data.sets.demo import load_demo
from rkd_cli.data.sets.folder import load_folder
from rkd_cli.data.sets.sop import load_sop
from rkd_cli.errors import DataError
from rkd_cli.events import Reporter, silent

__all__ = ["BalancedBatchSampler", "ImageSet", "load_dataset"]

DATASETS: dict[str, Callable[[Path, Reporter], tuple[ImageSet, ImageSet]]] = {
    "cub200": load_cub200,
    "cars196": load_cars196,
    "sop": load_sop,
    "folder": load_folder,
    "demo": load_demo,
}


def load_dataset(name: str, root: Path, report: Reporter = silent) -> tuple[ImageSet, ImageSet]:
    """Training and evaluation split of a data set.

    Args:
        name: what ``--dataset`` takes.
        root: what ``--data`` takes.
    Raises:
        DataError: an unknown name, or a set that is absent or damaged.
    """
    if name not in DATASETS:
        raise DataError(f"{name}: no such data set here")
    return DATASETS[name](root, report)
