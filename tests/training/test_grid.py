"""Grids: a run for each combination of values, one after another or at once, killed and resumed as a whole."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rkd_cli.errors import SettingsError
from rkd_cli.runtime.files import is_locked
from rkd_cli.settings import DistillSettings, EvaluateSettings, TeacherSettings
from rkd_cli.settings.resolve import GRID, check_effect, grid_text, resolve, resolve_grid

Flags = dict[str, Any]
Rkd = Callable[..., tuple[int, str, str]]


def test_each_combination_is_a_run_in_its_own_directory() -> None:
    flags = {"teacher": "t", "dist_ratio": "1,2.0", "angle_ratio": "1e-3, 4", "fold": "1/2,2/2", "save_dir": "g"}
    runs = {str(run.save_dir): run for run in resolve_grid(DistillSettings, flags)}
    assert list(runs)[:2] == [f"g/dist-ratio-1_angle-ratio-0.001_fold-{fold}of2" for fold in (1, 2)]
    assert {(run.dist_ratio, run.angle_ratio, run.fold) for run in runs.values()} == {
        (d, a, fold) for d in (1, 2) for a in (0.001, 4) for fold in ("1/2", "2/2")
    }
    assert [run.save_dir.name for run in resolve_grid(TeacherSettings, {"seed": "1,2"})] == ["seed-1", "seed-2"]
    assert resolve_grid(TeacherSettings, {"recall": "1,2", "lr_decay_epochs": "3,4"})[0].save_dir == Path("teacher")
    assert resolve_grid(EvaluateSettings, {"recall": "1,2"}) == [resolve(EvaluateSettings, {"recall": "1,2"})]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"lr": "1e-3,0.001"}, "--lr: each value must appear once, got 1e-3,0.001"),
        ({"seed": "1,x"}, "--seed: must be a whole number, got x"),
        ({"workers": "1,2"}, "--workers: must be a whole number, got 1,2"),
        ({"base": "resnet18,resnet34"}, "--base: must be the name of a network"),
    ],
)
def test_what_is_no_grid_is_refused(flags: Flags, says: str) -> None:
    with pytest.raises(SettingsError) as caught:
        resolve_grid(TeacherSettings, flags)
    assert caught.value.problems[0].startswith(says)


def test_a_flag_needs_an_effect_in_one_run_of_a_grid() -> None:
    given = {"teacher": "t", "triplet_ratio": "0,1", "triplet_margin": "0.3"}
    first, second = resolve_grid(DistillSettings, given)
    check_effect(first, given, [second])
    with pytest.raises(SettingsError, match="--triplet-margin: has no effect"):
        check_effect(first, given)


@pytest.mark.parametrize(("words", "says"), [((), "one run"), (("--seed", "1,2", "--nproc", "2"), "--nproc")])
def test_jobs_without_a_grid_are_refused(rkd: Rkd, words: tuple[str, ...], says: str) -> None:
    code, _, err = rkd("train-teacher", "--jobs", "2", *words)
    assert code == 2 and err.startswith(f"rkd: error: --jobs 2: has no effect with {says}")


def test_runs_that_had_not_begun_start_with_the_flags_of_the_grid(tmp_path: Path) -> None:
    """Not with the settings that another run of the grid came to: here a smaller batch, and unit length."""
    config = tmp_path / "c.toml"
    config.write_text("iter_per_epoch = 7\n")
    given: Flags = {"teacher": "t", "d3_ratio": "0,1", "jobs": "2", "save_dir": str(tmp_path)}
    runs = resolve_grid(DistillSettings, given, config)
    (tmp_path / GRID).write_text(grid_text(given, config))
    runs[0].save_dir.mkdir()
    done = runs[0].model_copy(update={"batch": 24, "l2normalize": True})
    (runs[0].save_dir / "settings.json").write_text(done.model_dump_json())
    first, second = resolve_grid(DistillSettings, {"resume": True, "save_dir": str(tmp_path)})
    assert (first.resume, first.batch, first.l2normalize, first.jobs) == (True, 24, True, 2)
    assert second == runs[1] and second.model_fields_set == runs[1].model_fields_set
    (tmp_path / GRID).write_text('{"flags": 3}')
    with pytest.raises(SettingsError, match=r"grid\.json: is damaged"):
        resolve_grid(DistillSettings, {"resume": True, "save_dir": str(tmp_path)})


def test_a_run_that_fails_stops_no_other(quick: Flags, tmp_path: Path, rkd: Rkd) -> None:
    words = [f"--{name.replace('_', '-')}={value}" for name, value in quick.items() if name != "batch"]
    code, out, err = rkd("train-teacher", *words, "--batch", "200,8", "--quiet")
    assert code == 2
    assert err.startswith(f"rkd: error: {tmp_path / 'run/batch-200'}: a batch of 200") and err.count("\n") == 1
    assert (tmp_path / "run/batch-8/result.json").is_file() and "batch-8" in out
    code, out, err = rkd("train-teacher", *words[:-1], "--batch", "200,300", "--save-dir", tmp_path / "none")
    assert code == 2 and not (tmp_path / "none" / GRID).exists()


def figures(place: Path) -> dict[str, list[Any]]:
    """Of each epoch of each run, without times."""
    return {
        path.parent.name: [
            {name: row[name] for name in ("epoch", "losses", "figures", "is_best")}
            for row in map(json.loads, path.read_text().splitlines())
        ]
        for path in sorted(place.glob("*/metrics.jsonl"))
    }


@pytest.mark.slow
def test_a_grid_that_is_killed_twice_ends_as_one_that_is_not(quick: Flags, tmp_path: Path) -> None:
    quick = {**quick, "epochs": "4", "iter_per_epoch": "2"}
    words = [f"--{name.replace('_', '-')}={value}" for name, value in quick.items()]
    grid = ["--seed=1,2,3", "--jobs=2", "--quiet"]

    def start(place: Path, *more: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "rkd_cli", "train-teacher", f"--save-dir={place}", *more]
        return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})

    words = [word for word in words if not word.startswith("--save-dir")]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(whole, *words, *grid).wait(timeout=600) == 0
    more = [*words, *grid]
    for epochs in (3, 9):  # of all runs together
        process = start(killed, *more)
        while sum(map(len, figures(killed).values())) < epochs:
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        while any(is_locked(path) for path in killed.glob("*/.lock")):  # its runs end with it
            time.sleep(0.1)
        more = ["--resume", "--quiet"]
    finished = {path: path.stat().st_mtime_ns for path in killed.glob("*/result.json")}
    assert len(finished) < 3
    assert start(killed, *more).wait(timeout=600) == 0
    assert figures(killed) == figures(whole) and len(figures(whole)) == 3
    assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in finished.items()), "finished ones are skipped"
