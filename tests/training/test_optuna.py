"""The manual's search with Optuna runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rkd_cli.events import silent
from rkd_cli.manual import read_page
from rkd_cli.settings import TeacherSettings
from rkd_cli.settings.resolve import resolve
from rkd_cli.training.loop import train
from rkd_cli.training.open import build_run

Flags = dict[str, str | bool]


def test_the_search_of_the_manual_runs(quick: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    monkeypatch.chdir(tmp_path)
    train(build_run(resolve(TeacherSettings, quick | {"save_dir": "teacher"}), silent), silent)
    own = {"lr", "save_dir", "sample"}
    lines = [
        f"{name} = {text if re.fullmatch('[0-9]+', str(text)) else repr(text)}"
        for name, text in quick.items()
        if name not in own
    ]
    (tmp_path / "student.toml").write_text(
        "\n".join([*lines, "teacher = 'teacher'", "batch = 4"]).replace("batch = 8\n", "")
    )
    (block,) = (found for found in re.findall(r"```py\n(.*?)```", read_page("python"), re.DOTALL) if "optuna" in found)
    assert len(block.splitlines()) <= 25
    found: dict[str, object] = {}
    exec(compile(block.replace("n_trials=20", "n_trials=2"), "the manual", "exec"), found)
    study = found["study"]
    assert isinstance(study, optuna.Study)
    assert {path.name for path in (tmp_path / "trials").iterdir()} == {"0", "1"}
    assert set(study.best_params) == {"lr", "angle"} and 0 <= study.best_value <= 1
