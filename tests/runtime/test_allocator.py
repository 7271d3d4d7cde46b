"""Large blocks are reused instead of mapped afresh, and the results of a training do not change."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import rkd_cli

_FAULTS = """
import sys, resource
from rkd_cli import keep_memory
changed = keep_memory() if "keep" in sys.argv else None
import torch
def work():
    for _ in range(20):
        torch.empty(48 << 20, dtype=torch.uint8).fill_(1)
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(changed, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

glibc = pytest.mark.skipif(sys.platform != "linux" or not os.confstr("CS_GNU_LIBC_VERSION"), reason="needs glibc")


def python(*arguments: object, **environment: str) -> str:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k != "GLIBC_TUNABLES"}
    at = str(Path(rkd_cli.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=kept | {"PYTHONPATH": at} | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    return done.stdout


@glibc
def test_large_blocks_are_reused_without_page_faults() -> None:
    changed, ours = python("-c", _FAULTS, "keep").split()
    untouched, theirs = python("-c", _FAULTS).split()
    assert changed == "True" and int(ours) < 100
    assert untouched == "None" and int(theirs) > 400, "importing the library changes nothing"


def test_settings_of_the_user_are_left_alone() -> None:
    for name, value in (("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=131072"), ("MALLOC_TRIM_THRESHOLD_", "131072")):
        assert python("-c", "import rkd_cli; print(rkd_cli.keep_memory())", **{name: value}).strip() == "False"


@glibc
def test_training_ends_with_the_same_bits(tiny_set: Path, tmp_path: Path) -> None:
    flags = (
        "--data", tiny_set.parent, "--dataset", "cub200", "--base", "squeezenet1_1", "--weights", "none", "--resize",
        40, "--image-size", 36, "--batch", 16, "--num-image-per-class", 4, "--iter-per-epoch", 4, "--epochs", 1,
        "--device", "cpu", "--quiet",
    )  # fmt: skip
    for name, environment in (("kept", {}), ("default", {"GLIBC_TUNABLES": "glibc.malloc.top_pad=131072"})):
        python("-m", "rkd_cli", "train-teacher", *flags, "--save-dir", tmp_path / name, **environment)
    ours, theirs = ((tmp_path / name / "last.safetensors").read_bytes() for name in ("kept", "default"))
    assert ours == theirs
