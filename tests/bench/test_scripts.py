"""The benchmarks behind the manual's figures: each runs at toy sizes, says what it does, and measures something."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from scripts import script

TOY = {
    "teachers": "--base shufflenet_v2_x0_5 --teacher-base shufflenet_v2_x0_5 --batch 10 --iter-per-epoch 2 --resize 36 "
    "--image-size 32 --repeats 1",
    "embed": "--base shufflenet_v2_x0_5 --batch 10 --workers 0 --resize 36 --image-size 32 --repeats 1",
    "search": "--repeats 1",
    "chunks": "--base shufflenet_v2_x0_5 --teacher-base shufflenet_v2_x0_5 --image-size 32",
    "processes": "--base shufflenet_v2_x0_5 --batch 10 --iter-per-epoch 2 --resize 36 --image-size 32",
}
PLACED = ("teachers", "embed", "processes")


@pytest.mark.slow
@pytest.mark.parametrize("name", list(TOY))
def test_each_script_measures_something(name: str, tmp_path: Path) -> None:
    place = ["--data", tmp_path] if name in PLACED else []
    out, progress = script(name, "--quick", "--device", "cpu", "--json", *TOY[name].split(), *place)
    rows = json.loads(out)["rows"]
    assert rows
    assert all(math.isfinite(row["seconds"]) and row["seconds"] > 0 for row in rows)
    assert name in ("processes", "search") or any(row["faster"] for row in rows)
    assert "Measuring " in progress


def test_a_flag_that_is_wrong_is_one_line() -> None:
    with pytest.raises(AssertionError, match=r"search.py: error: --repeats: must be at least 1"):
        script("search", "--repeats", "0")
