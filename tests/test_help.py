"""Help fits a screen, groups what it lists, and shows everything when asked."""

from __future__ import annotations

import re
from itertools import chain

import pytest
import typer

from rkd_cli.cli import app, main
from rkd_cli.settings import COMMANDS, DistillSettings, TeacherSettings, flag_name, help_panels

ALL = [command.name or "" for command in app.registered_commands]


def help_of(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    """What a terminal of 80 columns shows."""
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as end:
        main([*arguments])
    assert end.value.code == 0
    return capsys.readouterr().out


def flags_in(text: str) -> set[str]:
    return {flag.replace("[no-]", "") for flag in re.findall(r"^│ (--[a-z0-9\[\]-]+)", text, re.MULTILINE)}


@pytest.mark.parametrize("name", ["", *ALL])
def test_help_is_at_most_60_lines(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = help_of(capsys, monkeypatch, *name.split(), "--help").splitlines()
    assert len(lines) <= 60
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("name", COMMANDS)
def test_help_all_shows_every_flag(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    short = help_of(capsys, monkeypatch, name, "--help")
    panels = help_panels(COMMANDS[name])
    common = {flag_name(field) for field, panel in panels.items() if not panel.startswith("Advanced")}
    assert flags_in(short) - {"--help", "--help-all", "--json", "--quiet", "--config", "--dry-run"} == common
    assert ("--help-all" in short) == (len(common) < len(panels))
    if len(common) < len(panels):
        assert {*map(flag_name, panels)} <= flags_in(help_of(capsys, monkeypatch, name, "--help-all"))


def test_every_command_stands_in_a_group(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    groups: dict[str, list[str]] = {}
    for line in help_of(capsys, monkeypatch, "--help").splitlines():
        if line.startswith("╭"):
            here = groups.setdefault(line.strip("╭─╮ "), [])
        elif found := re.match(r"│ ([a-z-]+) ", line):
            here.append(found[1])
    groups.pop("Options")
    assert list(groups) == ["Train", "Measure", "Use", "Look after"]
    assert sorted(chain(*groups.values())) == sorted(ALL)
    assert {"train-teacher", "distill", "demo"} <= {*groups["Train"]}


def test_the_settings_of_a_command_are_those_of_the_manual() -> None:
    for name in ALL:
        (command,) = (one for one in app.registered_commands if one.name == name)
        assert command.callback
        taken = typer.utils.get_params_from_function(command.callback)
        assert {*COMMANDS[name].model_fields} <= {*taken} if name in COMMANDS else "config" not in taken


@pytest.mark.parametrize("model", [TeacherSettings, DistillSettings])
def test_help_of_a_training_begins_with_what_is_required_and_common(
    model: type[TeacherSettings | DistillSettings],
) -> None:
    first, *_ = panels = help_panels(model)
    assert first == ("teacher" if model is DistillSettings else "dataset")
    assert panels["save_dir"] == "Common"
    assert panels["cache_dir"] == "Advanced: data"
