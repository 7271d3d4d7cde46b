"""A resumed run has the same weights, bit for bit, as one that was never stopped."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file

from forked import Forked
from rkd_cli.errors import Interrupted, RkdError, RunError, SettingsError
from rkd_cli.events import Event, StepDone, silent
from rkd_cli.schemas import EpochDone, Position
from rkd_cli.settings import CHANGE_ON_RESUME, DistillSettings, TeacherSettings
from rkd_cli.settings.resolve import resolve
from rkd_cli.training.loop import Run, _Losses, train
from rkd_cli.training.open import build_run

Flags = dict[str, str | bool]
KINDS = ["teacher", "distill", "patient"]
PATIENT: Flags = {
    "crop": "resized", "jitter": "0.3", "mixup": "1", "optimizer": "adamw", "weight_decay": "0.1", "schedule": "cosine",
    "warmup": "1",
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tiny_set: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Flags]:
    """A folder for runs, and their flags; the teacher of the distillations is trained in it."""
    root = tmp_path_factory.mktemp("runs")
    flags: Flags = {
        "data": str(tiny_set), "cache_dir": str(root / "cache"), "weights": "none", "base": "timm:test_resnet",
        "embedding_size": "8", "resize": "36", "image_size": "32", "batch": "8", "num_image_per_class": "2",
        "iter_per_epoch": "4", "epochs": "3", "lr": "1e-3", "lr_decay_epochs": "2", "workers": "0", "device": "cpu",
        "keep_state": True,
    }  # fmt: skip
    train(build("teacher", flags | {"save_dir": str(root / "the-teacher")}), silent)
    return root, flags | {"teacher_load": str(root / "the-teacher/best.safetensors")}


def build(kind: str, flags: Flags) -> Run:
    if kind == "photos":
        flags = flags | {"dataset": "images"}
    if kind != "teacher":
        flags = flags | (PATIENT if kind == "patient" else {})
        return build_run(resolve(DistillSettings, flags), silent)
    return build_run(resolve(TeacherSettings, {k: v for k, v in flags.items() if k != "teacher_load"}), silent)


@pytest.fixture(scope="module", params=KINDS)
def uninterrupted(request: pytest.FixtureRequest, place: tuple[Path, Flags]) -> tuple[str, Path]:
    root, flags = place
    train(build(request.param, flags | {"save_dir": str(root / request.param)}), silent)
    return request.param, root / request.param


def facts(directory: Path) -> list[dict[str, Any]]:
    """The metrics without the times, which no two runs share."""
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in rows]


def assert_same(one: Path, other: Path) -> None:
    assert facts(one) == facts(other)
    for name in ("best.safetensors", "last.safetensors"):
        assert (one / name).read_bytes() == (other / name).read_bytes()
    ours, theirs = (load_file(path / "state.safetensors") for path in (one, other))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def stopping(run: Run, calls: int) -> Run:
    """The run, asked to stop from the n-th look at it on."""
    left = iter(range(calls))
    return replace(run, context=replace(run.context, stop_requested=lambda: next(left, None) is None))


def resumed(kind: str, directory: Path, **more: str | bool) -> Run:
    return build(kind, {"save_dir": str(directory), "resume": True, **more})


@pytest.mark.parametrize("stops", [[0], [12], [5, 1, 2, 1, 40], [1] * 12])
def test_a_stopped_run_ends_as_if_it_had_not_been(
    uninterrupted: tuple[str, Path], place: tuple[Path, Flags], tmp_path: Path, stops: list[int]
) -> None:
    (kind, whole), (_, flags) = uninterrupted, place
    run, stopped = build(kind, flags | {"save_dir": str(tmp_path)}), 0
    for calls in stops:
        try:
            train(stopping(run, calls), silent)
        except Interrupted:
            stopped += 1
        run = resumed(kind, tmp_path)
    train(run, silent)
    assert stopped >= min(len(stops), 4)
    assert_same(tmp_path, whole)


@pytest.mark.cuda
@pytest.mark.parametrize("kind", ["teacher", "distill"])
def test_on_a_gpu_a_stopped_run_ends_like_one_that_was_not(
    kind: str, place: tuple[Path, Flags], tmp_path: Path
) -> None:
    """Bit for bit where two runs that were not stopped agree so; where a GPU adds up in any order, about as well."""
    flags, stopped = place[1] | {"device": "cuda", "cache": "device", "precision": "fp32"}, 0
    for name in ("one", "other"):
        train(build(kind, flags | {"save_dir": str(tmp_path / name)}), silent)
    run = build(kind, flags | {"save_dir": str(tmp_path / "stopped")})
    for calls in (5, 1, 2):
        try:
            train(stopping(run, calls), silent)
        except Interrupted:
            stopped += 1
        run = resumed(kind, tmp_path / "stopped")
    train(run, silent)
    assert stopped == 3
    one, other, last = (load_file(tmp_path / name / "last.safetensors") for name in ("one", "other", "stopped"))

    def apart(weights: dict[str, torch.Tensor]) -> float:
        return max(float((weights[name].double() - one[name].double()).abs().max()) for name in one)

    assert apart(last) <= 10 * apart(other)


@pytest.mark.parametrize("stops", [[0], [9], [5, 1, 2, 1, 40]])
def test_a_stopped_run_without_labels_ends_as_if_it_had_not_been(
    place: tuple[Path, Flags], tmp_path: Path, stops: list[int]
) -> None:
    _, flags = place
    train(build("photos", flags | {"save_dir": str(tmp_path / "whole")}), silent)
    run = build("photos", flags | {"save_dir": str(tmp_path / "run")})
    for calls in stops:
        with pytest.raises(Interrupted):
            train(stopping(run, calls), silent)
        run = resumed("photos", tmp_path / "run")
    train(run, silent)
    assert_same(tmp_path / "run", tmp_path / "whole")


def test_a_save_within_an_epoch_is_gone_on_from(
    uninterrupted: tuple[str, Path], place: tuple[Path, Flags], tmp_path: Path
) -> None:
    (kind, whole), (_, flags) = uninterrupted, place
    run = build(kind, flags | {"save_dir": str(tmp_path), "save_every": "1"})
    seconds = itertools.count()
    run = replace(run, context=replace(run.context, clock=lambda: float(next(seconds))))

    def die(event: Event) -> None:
        if isinstance(event, StepDone) and (event.epoch, event.step) == (2, 3):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(run, die)
    seen: list[Event] = []
    train(resumed(kind, tmp_path), seen.append)
    steps = [(event.epoch, event.step) for event in seen if isinstance(event, StepDone)]
    assert (2, 2) not in steps
    assert [event.epoch for event in seen if isinstance(event, EpochDone)] == [0, 1, 2, 3]
    assert_same(tmp_path, whole)


def test_a_network_that_is_not_finite_is_not_saved(place: tuple[Path, Flags], tmp_path: Path) -> None:
    run = build("teacher", place[1] | {"save_dir": str(tmp_path)})
    run.directory.save_state(Position(epoch=1, step=2), run.learner, run.optimizer)
    before = (tmp_path / "state.safetensors").read_bytes()
    with torch.no_grad():
        run.model.get_parameter("linear.bias")[3] = math.nan
    with pytest.raises(RunError, match=r"epoch 1, step 3: weight linear.bias is not finite"):
        run.directory.save_state(Position(epoch=1, step=3), run.learner, run.optimizer)
    assert (tmp_path / "state.safetensors").read_bytes() == before


def test_epochs_can_be_added(uninterrupted: tuple[str, Path], place: tuple[Path, Flags], tmp_path: Path) -> None:
    (kind, whole), (_, flags) = uninterrupted, place
    if kind == "patient":
        with pytest.raises(SettingsError) as caught:
            resumed(kind, whole, epochs="4")
        assert str(caught.value) == (
            f"--epochs 4: the cosine schedule of the run in {whole} ends at epoch 3. Omit the flag, or start another "
            "run with --load."
        )
        return
    train(build(kind, flags | {"save_dir": str(tmp_path), "epochs": "1"}), silent)
    train(resumed(kind, tmp_path, epochs="3"), silent)
    assert_same(tmp_path, whole)
    assert json.loads((tmp_path / "settings.json").read_text())["epochs"] == 3


def test_a_finished_run_has_nothing_left_to_do(uninterrupted: tuple[str, Path]) -> None:
    kind, whole = uninterrupted
    before = (whole / "last.safetensors").stat().st_mtime_ns
    seen: list[Event] = []
    train(resumed(kind, whole), seen.append)
    assert [event.epoch for event in seen if isinstance(event, EpochDone)] == [0, 1, 2, 3]
    assert (whole / "last.safetensors").stat().st_mtime_ns == before
    assert (whole / "result.json").exists()


@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize("cache", ["none", "disk"])
def test_what_may_change_changes_no_bit(
    place: tuple[Path, Flags], uninterrupted: tuple[str, Path], tmp_path: Path, workers: str, cache: str
) -> None:
    (kind, whole), (_, flags) = uninterrupted, place
    with pytest.raises(Interrupted):
        train(stopping(build(kind, flags | {"save_dir": str(tmp_path / "run")}), 15), silent)
    more = {"workers": workers, "cache": cache, "cache_dir": str(tmp_path / "cache"), "save_every": "5"}
    train(resumed(kind, tmp_path / "run", **more), silent)
    assert_same(tmp_path / "run", whole)
    assert set(more) <= set(CHANGE_ON_RESUME)


@pytest.fixture(scope="module")
def half(place: tuple[Path, Flags]) -> Path:
    directory = place[0] / "half"
    with pytest.raises(Interrupted):
        train(stopping(build("distill", place[1] | {"save_dir": str(directory)}), 30), silent)
    return directory


@pytest.fixture
def stopped(half: Path, tmp_path: Path) -> Path:
    """A copy of a run that was stopped."""
    return shutil.copytree(half, tmp_path, dirs_exist_ok=True)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"lr": "0.5"}, "--lr 0.5: the run in {} has 0.001. Omit the flag."),
        ({"epochs": "2"}, "--epochs 2: the run in {} has 3, and cannot be shortened."),
        ({"overwrite": True}, "Omit --config and --overwrite"),
        ({"save_dir": "nowhere"}, "nowhere contains no run"),
        ({"lr": "x"}, "--lr: must be a number"),
    ],
)
def test_flags_that_contradict_the_run_are_errors(stopped: Path, more: Flags, says: str) -> None:
    with pytest.raises(SettingsError) as caught:
        resolve(DistillSettings, {"save_dir": str(stopped), "resume": True} | more)
    assert says.format(stopped) in str(caught.value)


def test_flags_that_agree_are_none(stopped: Path) -> None:
    settings = resolve(DistillSettings, {"save_dir": str(stopped), "resume": True, "lr": "1e-3", "epochs": "9"})
    assert (settings.lr, settings.epochs, settings.resume) == (1e-3, 9, True)


def test_a_run_of_a_version_without_fits_stays_squashed(tmp_path: Path) -> None:
    saved = {"save_dir": str(tmp_path), "dataset": "folder"}
    (tmp_path / "settings.json").write_text(json.dumps(saved))
    resumed = resolve(TeacherSettings, {"save_dir": str(tmp_path), "resume": True})
    assert resumed.fit == "square"
    (tmp_path / "settings.json").write_text(json.dumps(saved | {"fit": "pad"}))
    assert resolve(TeacherSettings, {"save_dir": str(tmp_path), "resume": True}).fit == "pad"


def test_an_epoch_of_which_no_step_was_left_has_a_speed() -> None:
    place: Any = SimpleNamespace(
        context=SimpleNamespace(clock=lambda: 100.0), learning_rate=None, loader=SimpleNamespace(batch=8)
    )
    losses = _Losses(place, Position(epoch=2, step=5, epoch_seconds=4.0))
    assert losses.images_per_second() == 10


def test_the_seconds_of_an_epoch_are_its_own(place: tuple[Path, Flags], tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train(stopping(build("teacher", place[1] | {"save_dir": str(tmp_path)}), 6), silent)
    run = resumed("teacher", tmp_path)
    assert run.directory.resumed and run.directory.resumed.epoch < 3
    at = run.directory.resumed.model_copy(update={"epoch_seconds": 1e6})
    train(replace(run, directory=replace(run.directory, resumed=at)), silent)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["seconds"] >= 1e6 for row in rows] == [row["epoch"] == at.epoch for row in rows]


def test_a_run_of_the_other_command_is_not_gone_on_with(stopped: Path) -> None:
    with pytest.raises(SettingsError, match="is a run of `rkd distill`"):
        resolve(TeacherSettings, {"save_dir": str(stopped), "resume": True})


@pytest.mark.parametrize("what", ["teacher", "image", "state", "best"])
def test_what_changed_since_is_named(stopped: Path, place: tuple[Path, Flags], what: str, tiny_set: Path) -> None:
    root, _ = place
    teacher, image = root / "the-teacher/best.safetensors", next(tiny_set.rglob("*.jpg"))
    path = {"teacher": teacher, "image": image}.get(what, stopped / f"{what}.safetensors")
    before = path.read_bytes()
    try:
        if what == "teacher":
            path.write_bytes((root / "the-teacher/last.safetensors").read_bytes())
        elif what == "image":
            listing = tiny_set / "images.txt"
            text = listing.read_text()
            renamed = image.with_name("other.jpg")
            image.rename(renamed)
            listing.write_text(text.replace(image.name, renamed.name))
        elif what == "state":
            path.write_bytes(before[:-9] + b"damaged!!")
        else:
            path.unlink()
        with pytest.raises(RkdError, match=r"changed|checksum|missing"):
            train(resumed("distill", stopped), silent)
    finally:
        if what == "image":
            renamed.rename(image)
            listing.write_text(text)
        else:
            path.write_bytes(before)
    train(resumed("distill", stopped), silent)


def test_a_directory_in_use_is_left_alone(stopped: Path) -> None:
    before = {path.name: path.read_bytes() for path in stopped.iterdir()}
    with FileLock(stopped / ".lock"), pytest.raises(SettingsError, match="another process is writing"):
        resumed("distill", stopped)
    run = resumed("distill", stopped)
    with FileLock(stopped / ".lock"), pytest.raises(SettingsError, match="another process is writing"):
        train(run, silent)
    assert {path.name: path.read_bytes() for path in stopped.iterdir()} == before


def test_a_run_without_a_state_starts_again(
    place: tuple[Path, Flags], uninterrupted: tuple[str, Path], tmp_path: Path
) -> None:
    (kind, whole), (_, flags) = uninterrupted, place

    def die(event: Event) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(
            build(kind, flags | {"save_dir": str(tmp_path)}),
            lambda e: die(e) if type(e).__name__ == "Progress" else None,
        )
    assert not (tmp_path / "state.safetensors").exists()
    train(resumed(kind, tmp_path), silent)
    assert_same(tmp_path, whole)


def start(kind: str, *arguments: str) -> Forked:
    command = ["-m", "rkd_cli", "train-teacher" if kind == "teacher" else "distill", *arguments]
    return Forked(command, os.environ | {"OMP_NUM_THREADS": "1"})


def as_arguments(kind: str, flags: Flags) -> list[str]:
    if kind == "patient":
        flags = {name: value for name, value in flags.items() if name != "lr_decay_epochs"} | PATIENT
    flags = {name: value for name, value in flags.items() if kind != "teacher" or name != "teacher_load"}
    return [f"--{k.replace('_', '-')}" + ("" if v is True else f"={v}") for k, v in flags.items()]


@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_random_moments_it_ends_the_same(kind: str, place: tuple[Path, Flags], tmp_path: Path) -> None:
    _, flags = place
    rng = random.Random(kind)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    flags = flags | {"save_every": "1"}
    began = time.monotonic()
    assert start(kind, *as_arguments(kind, flags | {"save_dir": str(whole)})).wait(timeout=120) == 0
    length = time.monotonic() - began
    fresh = as_arguments(kind, flags | {"save_dir": str(killed)})
    for kills_left in reversed(range(5)):
        resuming = ["--resume", f"--save-dir={killed}"] if (killed / "settings.json").exists() else fresh
        process = start(kind, *resuming)
        try:
            assert process.wait(timeout=rng.uniform(0.4, 1.0) * length if kills_left else 120) == 0
        except subprocess.TimeoutExpired:
            assert kills_left
            process.kill()
            process.wait(timeout=60)
    assert_same(killed, whole)
    assert {path.name for path in killed.iterdir()} == {path.name for path in whole.iterdir()}


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_resume(
    signum: signal.Signals, place: tuple[Path, Flags], tmp_path: Path
) -> None:
    directory = tmp_path / "a run"
    arguments = as_arguments("distill", place[1] | {"save_dir": str(directory), "epochs": "500"})
    process = start("distill", *arguments)
    process.until("epoch 1/", timeout=60)
    process.send_signal(signum)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signum
    assert errors.splitlines()[-1] == (
        f"rkd: interrupted and saved. Resume with `rkd distill --resume --save-dir '{directory}'`."
    )
    assert (directory / "state.safetensors").exists()
    assert resolve(DistillSettings, {"save_dir": str(directory), "resume": True}).epochs == 500


def test_metrics_that_a_kill_left_unwritten_are_rewritten(
    uninterrupted: tuple[str, Path], place: tuple[Path, Flags], tmp_path: Path
) -> None:
    """The state is saved first, the models next, the metrics last."""
    (kind, whole), (_, flags) = uninterrupted, place
    train(build(kind, flags | {"save_dir": str(tmp_path)}), silent)
    (tmp_path / "metrics.jsonl").unlink()
    train(resumed(kind, tmp_path), silent)
    assert facts(tmp_path) == facts(whole)
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert (row["seconds"], row["images_per_second"]) == (
            round(row["seconds"], 3),
            round(row["images_per_second"], 1),
        )
