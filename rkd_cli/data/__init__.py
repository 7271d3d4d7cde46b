"""Data sets, their splits, and the balanced batch sampler."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from rkd_cli.data.images import ImageSet
from rkd_cli.data.sampler import BalancedBatchSampler
from rkd_cli.errors import DataError
from rkd_cli.events import Reporter, silent

__all__ = ["BalancedBatchSampler", "ImageSet", "load_dataset"]


def load_dataset(name: str, root: Path, report: Reporter = silent) -> tuple[ImageSet, ImageSet]:
    """Training and evaluation split of a data set: ``load_NAME`` of the module ``rkd_cli.data.NAME``.

    Args:
        name: what ``--dataset`` takes.
        root: what ``--data`` takes.
    Raises:
        DataError: an unknown name, or a set that is absent or damaged.
    """
    try:
        load = getattr(import_module(f"rkd_cli.data.{name}"), f"load_{name}")
    except (ImportError, AttributeError):
        raise DataError(f"{name}: no such data set here") from None
    splits: tuple[ImageSet, ImageSet] = load(root, report)
    return splits
