"""Loggers: what a resumed run keeps of its curves, and a library that is not installed."""

from __future__ import annotations

import importlib.util
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from rkd_cli.errors import SettingsError
from rkd_cli.events import NetworkFacts, ObjectiveFacts, RunStarted, StepDone, silent
from rkd_cli.screen import loggers
from rkd_cli.screen.loggers import logged


def started(save_dir: Path, resumed_at: tuple[int, int] | None = None) -> RunStarted:
    network, objectives = NetworkFacts("resnet18", 1, 8, l2normalize=False), (ObjectiveFacts({"angle": 1.0}),)
    run = RunStarted("distill", "demo", (), network, None, objectives, None, "CPU", "fp32", "", save_dir, 3, 10)
    return replace(run, resumed_at=resumed_at)


def step(epoch: int, number: int, loss: float) -> StepDone:
    return StepDone(epoch, number, {"angle": loss}, 1e-4, 12.34)


def test_a_resumed_run_draws_nothing_twice(tmp_path: Path) -> None:
    with logged(silent, ["csv"], "{}") as report, suppress(KeyboardInterrupt):
        report(started(tmp_path))
        for number in (4, 7, 9):
            report(step(2, number, float(number)))
        raise KeyboardInterrupt
    with (tmp_path / "steps.csv").open("a") as file:
        file.write("2,9,0.")  # as a kill leaves it
    with logged(silent, ["csv"], "{}") as report:
        report(started(tmp_path, resumed_at=(2, 7)))
        report(step(2, 10, 0.5))
    assert (tmp_path / "steps.csv").read_text().splitlines() == [
        "epoch,step,angle,learning_rate,images_per_second",
        "2,4,4.0,0.0001,12.3",
        "2,7,7.0,0.0001,12.3",
        "2,10,0.5,0.0001,12.3",
    ]
    with logged(silent, ["csv"], "{}") as report:
        report(started(tmp_path))  # --overwrite
    assert (tmp_path / "steps.csv").read_text() == ""


def test_curves_beyond_the_saved_state_are_hidden(tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with logged(silent, ["tensorboard"], "{}") as report:
        report(started(tmp_path))
        report(step(1, 4, 4.0))
        report(step(1, 9, 9.0))
    time.sleep(1.1)  # files of one second are read in the order of a counter's digits: 10 before 9
    with logged(silent, ["tensorboard"], "{}") as report:
        report(started(tmp_path, resumed_at=(1, 7)))
        report(step(1, 8, 8.0))
    found = events.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [scalar.step for scalar in found.Scalars("loss/angle")] == [4, 8]


def test_the_screen_is_told_all_the_same(tmp_path: Path) -> None:
    told: list[object] = []
    with logged(told.append, ["csv"], "{}") as report:
        report(started(tmp_path))
        report(step(1, 1, 1.0))
    assert [type(event) for event in told] == [RunStarted, StepDone]


def test_a_library_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        loggers, "find_spec", lambda name: None if name == "tensorboard" else importlib.util.find_spec(name)
    )
    with (
        pytest.raises(SettingsError, match="pip install 'rkd-cli\\[tensorboard\\]'"),
        logged(silent, ["tensorboard"], ""),
    ):
        pass
