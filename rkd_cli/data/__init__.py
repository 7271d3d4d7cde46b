"""Data sets, their splits, and the balanced batch sampler."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rkd_cli.data.cars196 import load_cars196
from rkd_cli.data.cub200 import load_cub200
from rkd_cli.data.demo import load_demo
from rkd_cli.data.folder import load_folder
from rkd_cli.data.images import ImageSet
from rkd_cli.data.sampler import BalancedBatchSampler
from rkd_cli.data.sop import load_sop
from rkd_cli.events import Reporter

__all__ = [
    "DATASETS",
    "BalancedBatchSampler",
    "ImageSet",
    "load_cars196",
    "load_cub200",
    "load_demo",
    "load_folder",
    "load_sop",
]

# each takes the --data directory and a reporter, and gives the training and the evaluation split
DATASETS: dict[str, Callable[[Path, Reporter], tuple[ImageSet, ImageSet]]] = {
    "cub200": load_cub200,
    "cars196": load_cars196,
    "sop": load_sop,
    "folder": load_folder,
    "demo": load_demo,
}
