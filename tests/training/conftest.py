"""Runs of a second, for the tests of what happens around the training loop."""

from __future__ import annotations

from pathlib import Path

import pytest

Flags = dict[str, str | bool]


@pytest.fixture
def quick(tiny_set: Path, tmp_path: Path) -> Flags:
    """Flags of a teacher's run that is over in a second; it writes to ``tmp_path / "run"``."""
    return {
        "dataset": "cub200", "data": str(tiny_set), "weights": "none", "base": "timm:test_resnet",
        "embedding_size": "8", "resize": "36", "image_size": "32", "batch": "8", "num_image_per_class": "2",
        "iter_per_epoch": "1", "epochs": "1",
        "lr": "1e-3", "sample": "all", "workers": "0", "device": "cpu", "cache": "none",
        "save_dir": str(tmp_path / "run"),
    }  # fmt: skip
