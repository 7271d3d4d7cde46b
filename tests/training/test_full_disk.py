"""A disk that is full at any save: one line, and The previous file is unchanged.."""

from __future__ import annotations

import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rkd_cli.errors import RunError
from rkd_cli.events import Event, Progress, silent
from rkd_cli.models import checkpoint, load_model
from rkd_cli.runtime import files
from rkd_cli.schemas import EpochDone
from rkd_cli.settings import TeacherSettings
from rkd_cli.settings.resolve import resolve
from rkd_cli.training.loop import Run, train
from rkd_cli.training.open import build_run
from rkd_cli.training.state import read_position

Flags = dict[str, str | bool]
FILES = [
    "settings.json",
    "last.safetensors",
    "best.safetensors",
    "metrics.jsonl",
    "metrics.csv",
    "state.safetensors",
    "result.json",
]


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """The kernel refuses to write more, as it does where a disk is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def flags(tiny_set: Path, tmp_path: Path) -> Flags:
    return {
        "data": str(tiny_set), "weights": "none", "base": "shufflenet_v2_x0_5", "embedding_size": "8", "resize": "36",
        "image_size": "32", "batch": "8", "num_image_per_class": "2", "iter_per_epoch": "2", "epochs": "2",
        "keep_state": True, "lr": "1e-3", "workers": "0", "device": "cpu", "cache": "none",
        "save_dir": str(tmp_path / "run"),
    }  # fmt: skip


def build(flags: Flags, **more: str | bool) -> Run:
    return build_run(resolve(TeacherSettings, flags | more), silent)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("name", FILES)
def test_each_kind_of_save_fails_whole(
    flags: Flags, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "run"
    train(build(flags), silent)
    first = contents(directory)
    real = files.replace_file
    before: dict[str, bytes] = {}

    def limited(path: Path, write: Callable[[Path], object]) -> None:
        if path.name != name:
            return real(path, write)
        before.update(contents(directory))
        with files_up_to(50):
            return real(path, write)

    for module in (files, checkpoint):  # texts, and tensors
        monkeypatch.setattr(module, "replace_file", limited)
    run = build(flags, overwrite=True)
    with pytest.raises(RunError) as caught:
        train(run, silent)
    assert len(caught.value.problems) == 1
    assert str(caught.value).startswith(f"{directory / name}: cannot be written (")
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 1
    assert contents(directory) == before
    for model in ("last.safetensors", "best.safetensors"):
        load_model(directory / model)
    if (directory / "state.safetensors").exists():
        read_position(directory / "state.safetensors")

    monkeypatch.undo()  # there is room again
    resume = name != "settings.json"  # before it, there is no run to resume
    again = build({"save_dir": str(directory), "resume": True}) if resume else build(flags, overwrite=True)
    train(again, silent)
    for file in ("last.safetensors", "best.safetensors"):
        assert (directory / file).read_bytes() == first[file]


def test_a_cache_that_does_not_fit_leaves_nothing(flags: Flags, tmp_path: Path) -> None:
    with files_up_to(5000), pytest.raises(RunError, match="the cache cannot be written") as caught:
        build(flags, cache="disk", cache_dir=str(tmp_path / "cache"))
    assert len(caught.value.problems) == 1
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_a_directory_that_vanishes_stops_the_run(flags: Flags, tmp_path: Path) -> None:
    def vanish(event: Event) -> None:
        if isinstance(event, Progress) and (tmp_path / "run/state.safetensors").exists():
            shutil.rmtree(tmp_path / "run", ignore_errors=True)

    with pytest.raises(RunError, match=r"cannot be written \(No such file or directory\)"):
        train(build(flags), vanish)


def test_what_is_left_of_a_killed_save_is_removed(flags: Flags, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    seen: list[Event] = []
    train(build(flags), seen.append)
    for name in (".last.safetensors.4711.part", ".tmpo3mP5j"):
        (directory / name).write_bytes(b"half")
    train(build({"save_dir": str(directory), "resume": True}), silent)
    assert {path.name for path in directory.iterdir()} == {*FILES, ".lock"}
    assert sum(isinstance(event, EpochDone) for event in seen) == 3
