"""What processes tell each other through their store: who failed first, whose a run is, when not to wait."""

from __future__ import annotations

import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from torch._C._distributed_c10d import HashStore

from rkd_cli.errors import RunError
from rkd_cli.runtime import distributed, signals
from rkd_cli.runtime.distributed import Ranks, conclude, has_begun, remember_begun
from rkd_cli.schemas import Position
from rkd_cli.training.loop import Run, _agree_on_state


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Any:
    found = HashStore()
    monkeypatch.setattr(distributed._World, "store", found)
    monkeypatch.setattr(distributed._World, "all_starts", found)
    return found


@pytest.mark.usefixtures("store")
def test_all_end_like_the_first_that_failed_which_alone_says_why() -> None:
    assert [conclude(2), conclude(1), conclude(130)] == [(2, True), (2, False), (2, False)]


@pytest.mark.usefixtures("store")
def test_a_run_is_known_by_whom_it_was_begun(tmp_path: Path) -> None:
    remember_begun(tmp_path / "mine")
    assert has_begun(tmp_path / "other/../mine")
    assert not has_begun(tmp_path / "other")


def test_a_process_alone_has_begun_nothing(tmp_path: Path) -> None:
    remember_begun(tmp_path)
    assert not has_begun(tmp_path)
    assert conclude(1) == (1, True)


def test_who_waits_for_the_others_is_ended_by_a_signal(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    store.add("ended", 1)  # so that nobody waits for ever where the signal is ignored
    monkeypatch.setattr(signals._State, "signum", int(signal.SIGTERM))
    with pytest.raises(signals.Stopped):
        Ranks(0, 2).wait()


def test_who_waits_for_one_that_failed_is_told(store: Any) -> None:
    store.add("ended", 1)
    with pytest.raises(RunError, match="another process of this run"), Ranks(1, 2).first():
        pass


@pytest.mark.parametrize("other", [-1, 3 * 10**9, 4 * 10**9 + 7])
def test_ranks_that_see_another_state_are_told(other: int) -> None:
    """The other rank stands elsewhere, or at the same step of the same epoch."""
    mine = 4 * 10**9 + 7
    ranks = SimpleNamespace(wait=lambda: None, largest=lambda number: max(number, other if number >= 0 else -other))
    directory = SimpleNamespace(path=Path("run"), resumed=Position(epoch=4, step=7))
    run = cast(Run, SimpleNamespace(context=SimpleNamespace(ranks=ranks), directory=directory))
    if other == mine:
        _agree_on_state(run)
        return
    with pytest.raises(RunError, match=r"^--save-dir run: processes read different resume states"):
        _agree_on_state(run)
