"""A side of a benchmark in a process of its own: it answers, it fails by name, and only ours keeps memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rkd_cli.bench import measure, reference
from rkd_cli.bench.apart import Apart
from rkd_cli.errors import RunError
from rkd_cli.settings import BenchSettings

ANSWERS = """
from rkd_cli.bench.apart import answer

def times(seconds):
    print("a library that talks")
    return [seconds, 2.5]

answer(times, lambda: 7)
"""


def test_it_answers_whatever_libraries_print(tmp_path: Path) -> None:
    (tmp_path / "side.py").write_text(ANSWERS)
    with Apart([str(tmp_path / "side.py")]) as side:
        assert side.times(0.5) == [0.5, 2.5]
        assert side.peak() == 7
        assert side.times(0) == [0, 2.5]
    assert side._process.returncode == 0


def test_a_process_that_ends_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "early.py").write_text("raise SystemExit(3)")
    with pytest.raises(RunError, match="exited with code 3"):
        Apart([str(tmp_path / "early.py")])
    (tmp_path / "late.py").write_text(ANSWERS.replace("return [seconds, 2.5]", "raise SystemExit(4)"))
    with Apart([str(tmp_path / "late.py")]) as side, pytest.raises(RunError, match="exited with code 4"):
        side.times(1)


@pytest.mark.parametrize(("side", "keeps"), [("ours", True), ("textbook", False)])
def test_the_textbook_has_the_allocator_of_its_users(side: str, keeps: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, asked = list[bool](), list[list[float]]()

    def answer(times: Callable[[float], list[float]], peak: Callable[[], int | None]) -> None:
        asked.append(times(0))

    case = SimpleNamespace(name="teacher", step=lambda: None, epoch=lambda: None)
    monkeypatch.setattr(measure, "keep_memory", lambda: kept.append(True))
    monkeypatch.setattr(reference, "answer", answer)
    monkeypatch.setattr(reference, "cases", lambda *_: iter([case]))
    monkeypatch.setattr(reference, "training", lambda *_: {"epoch": lambda: None})
    reference._main(
        BenchSettings(device="cpu").model_dump_json(), "epoch", "teacher", side, str(torch.get_num_threads())
    )
    assert bool(kept) == keeps
    assert len(asked[0]) == 1
