"""Loggers: what a resumed run keeps of its curves, and a library that is not installed."""

from __future__ import annotations

import importlib.util
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rkd_cli.errors import SettingsError
from rkd_cli.events import NetworkFacts, ObjectiveFacts, Retrieved, RunStarted, StepDone, silent
from rkd_cli.schemas import EpochDone
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


@pytest.mark.parametrize("kind", ["tensorboard", "wandb", "mlflow"])
def test_a_library_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(loggers, "find_spec", lambda name: None if name == kind else importlib.util.find_spec(name))
    with (
        pytest.raises(SettingsError, match=f"--log {kind}: not installed. Run `pip install 'rkd-cli\\[{kind}\\]'`"),
        logged(silent, [kind], ""),
    ):
        pass


def epoch(number: int, recall: float) -> EpochDone:
    return EpochDone(
        epoch=number, losses={"angle": 2.0} if number else {}, figures={"eval": {"R@1": recall}}, seconds=3.0,
        is_best=True,
    )  # fmt: skip


def interrupted_and_resumed(kind: str, save_dir: Path) -> None:
    """Two epochs of ten steps, with a stop between them; a resumed run tells of its earlier epochs again."""
    settings = '{"lr": 0.5, "dataset": "auto"}'
    with logged(silent, [kind], settings) as report, suppress(KeyboardInterrupt):
        report(started(save_dir))
        report(epoch(0, 0.1234))
        report(step(1, 10, 1.0))
        report(Retrieved(1, lambda: torch.zeros(4, 4, 3, dtype=torch.uint8)))
        report(epoch(1, 0.2345))
        raise KeyboardInterrupt
    with logged(silent, [kind], settings) as report:
        report(started(save_dir, resumed_at=(2, 0)))
        report(epoch(0, 0.1234))
        report(epoch(1, 0.2345))
        report(epoch(2, 0.3456))


def test_mlflow_holds_settings_and_figures_of_a_resumed_run_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracking = pytest.importorskip("mlflow.tracking")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    interrupted_and_resumed("mlflow", tmp_path)
    client = tracking.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("rkd").experiment_id])
    assert (run.info.run_name, run.info.status) == (tmp_path.name, "FINISHED")
    assert run.data.params == {"lr": "0.5", "dataset": "demo"}

    def history(name: str) -> list[tuple[int, float]]:
        return [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, name)]

    assert history("eval/R_at_1") == [(0, 0.1234), (10, 0.2345), (20, 0.3456)]
    assert history("epoch/angle") == [(10, 2.0), (20, 2.0)]
    assert history("loss/angle") == [(10, 1.0)]
    assert client.list_artifacts(run.info.run_id)


def test_wandb_writes_settings_and_figures_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    interrupted_and_resumed("wandb", tmp_path)
    first, second = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime)
    assert first.name == second.name == f"run-{(tmp_path / '.wandb.txt').read_text()}.wandb"
    for file, recalls in ((first, (b"0.1234", b"0.2345")), (second, (b"0.3456",))):
        data = file.read_bytes()
        assert b"eval/R@1" in data and b"lr" in data and b"demo" in data
        assert {value for value in (b"0.1234", b"0.2345", b"0.3456") if value in data} == {*recalls}
    assert b"retrieval" in first.read_bytes()


def test_wandb_without_a_key_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb").teardown()  # it reads the environment once
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # no key in ~/.netrc
    with (
        pytest.raises(SettingsError, match=r"--log wandb: .*WANDB_MODE=offline logs into the run directory"),
        logged(silent, ["wandb"], "{}") as report,
    ):
        report(started(tmp_path))
