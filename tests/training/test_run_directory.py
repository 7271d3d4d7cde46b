"""A run's files: none of a broken network, none touched by a refusal, all of one epoch after a kill at any write."""

from __future__ import annotations

import itertools
import json
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from rkd_cli.data.loader import Batch
from rkd_cli.errors import RkdError, RunError
from rkd_cli.events import Event, Note, silent
from rkd_cli.models import checkpoint, load_model
from rkd_cli.models.checkpoint import read_header, save_described
from rkd_cli.runtime import files
from rkd_cli.schemas import EpochDone
from rkd_cli.settings import DistillSettings, TeacherSettings
from rkd_cli.settings.resolve import resolve
from rkd_cli.training.loop import Run, train
from rkd_cli.training.open import build_run
from rkd_cli.training.run_directory import RunDirectory
from rkd_cli.training.state import read_position

Flags = dict[str, str | bool]
Rkd = Callable[..., tuple[int, str, str]]


@pytest.fixture
def quick(quick: Flags) -> Flags:
    return {**quick, "keep_state": True}


class Killed(BaseException):
    """In the place of SIGKILL."""


def teacher_run(flags: Flags, **more: str | bool) -> Run:
    return build_run(resolve(TeacherSettings, flags | more), silent)


def resumed(directory: Path, **more: str | bool) -> Run:
    return teacher_run({"save_dir": str(directory), "resume": True}, **more)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def writes_before(monkeypatch: pytest.MonkeyPatch, dies: Callable[[Path], bool]) -> None:
    """From here on every write asks ``dies`` first."""
    real = files.replace_file

    def write(path: Path, content: Callable[[Path], object]) -> None:
        if dies(path):
            raise Killed
        real(path, content)

    for module in (files, checkpoint):  # texts, and tensors
        monkeypatch.setattr(module, "replace_file", write)


def test_the_folders_above_it_are_made_too(tmp_path: Path) -> None:
    RunDirectory.find(tmp_path / "some/where/run", overwrite=False, resume=False).make()
    assert (tmp_path / "some/where/run").is_dir()


def test_weights_that_are_not_finite_reach_no_file(quick: Flags, tmp_path: Path) -> None:
    """No loss tells of them, nor an evaluation, for that comes every four epochs."""
    run = teacher_run(quick, epochs="4", eval_every="4")
    before: dict[str, bytes] = {}

    def broken(batch: Batch, epoch: int) -> dict[str, Tensor]:
        return {"odd": (0 * run.model.get_parameter("linear.weight")).sum().sqrt()}  # 0, and its gradient is NaN

    def look(event: Event) -> None:
        if isinstance(event, EpochDone):
            before.update(contents(tmp_path / "run"))

    with pytest.raises(RunError) as caught:
        train(replace(run, step=broken), look)
    assert str(caught.value) == (
        "epoch 2, step 0: weight linear.weight is not finite. Lower --lr. The files saved before are intact."
    )
    assert contents(tmp_path / "run") == before
    for name in ("best.safetensors", "last.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_model(tmp_path / "run" / name).state_dict().values())


@pytest.mark.parametrize("is_best", [True, False])
@pytest.mark.parametrize("name", ["linear.bias", "base.bn1.running_var"])
def test_a_model_file_takes_finite_weights_alone(quick: Flags, tmp_path: Path, name: str, is_best: bool) -> None:
    run = teacher_run(quick)
    rows = tuple(
        EpochDone(epoch=epoch, seconds=1.0, figures={"eval": {"R@1": 0.5}}, is_best=is_best) for epoch in (0, 1)
    )
    run.directory.save_models(rows[:1], run.model, run.header)
    before = contents(tmp_path / "run")
    run.model.state_dict()[name][1] = torch.inf
    with pytest.raises(RunError, match=f"^epoch 1: weight {name} is not finite"):
        run.directory.save_models(rows, run.model, run.header)
    assert contents(tmp_path / "run") == before


def test_a_kill_at_any_write_leaves_the_best_model_of_the_best_epoch(
    quick: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The replay finds other recalls than the steps that the kill undid, as on a GPU."""
    recalls = random.Random(5)
    monkeypatch.setattr("rkd_cli.training.loop.recall_at_k", lambda *_: {1: recalls.random()})
    fates: Iterator[bool] = iter(())
    writes_before(monkeypatch, lambda path: next(fates, False))
    flags = quick | {"epochs": "2", "eval_train": False, "save_every": "1"}

    def saving_each_step(run: Run) -> Run:
        seconds = itertools.count()
        return replace(run, context=replace(run.context, clock=lambda: float(next(seconds))))

    kills = 0
    for survived in itertools.count(1):  # settings.json always is
        directory = tmp_path / str(survived)
        fates = iter([False] * survived + [True])
        try:
            train(saving_each_step(teacher_run(flags, save_dir=str(directory))), silent)
            break
        except Killed:
            kills += 1
        result = train(saving_each_step(resumed(directory)), silent)
        best, last = (read_header(directory / f"{name}.safetensors") for name in ("best", "last"))
        saved = json.loads((directory / "result.json").read_text())
        rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
        assert best.epoch == saved["best_epoch"] == result.result.best_epoch
        assert best.eval_recall[1] == saved["best"]["eval"]["R@1"] == rows[best.epoch]["figures"]["eval"]["R@1"]
        assert saved["best"]["eval"]["R@1"] == max(row["figures"]["eval"]["R@1"] for row in rows if row["figures"])
        assert last.epoch == 2
        assert last.eval_recall[1] == rows[2]["figures"]["eval"]["R@1"]
        if best.epoch == 2:
            assert (directory / "best.safetensors").read_bytes() == (directory / "last.safetensors").read_bytes()
    assert kills >= 12  # a state, a model or two and the metrics for each of three epochs; what steps save; the result


def test_models_of_an_overwritten_run_are_not_taken_for_the_new_ones(
    quick: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old run ended where the new one is killed, at the same epoch, with the same recall."""
    monkeypatch.setattr("rkd_cli.training.loop.recall_at_k", lambda *_: {1: 0.5})
    train(teacher_run(quick, seed="2", save_dir=str(tmp_path / "whole")), silent)

    def dies_at_epoch_0(event: Event) -> None:
        if isinstance(event, EpochDone):
            raise Killed

    with pytest.raises(Killed):
        train(teacher_run(quick, seed="1"), dies_at_epoch_0)
    with monkeypatch.context() as patch:
        writes_before(patch, lambda path: path.name == "best.safetensors")
        with pytest.raises(Killed):
            train(teacher_run(quick, seed="2", overwrite=True), silent)
    train(resumed(tmp_path / "run"), silent)
    for name in ("best.safetensors", "last.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_best_model_of_the_last_epoch_that_is_gone_is_made_again(
    quick: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recalls = itertools.count(1)
    monkeypatch.setattr("rkd_cli.training.loop.recall_at_k", lambda *_: {1: next(recalls) / 100})
    train(teacher_run(quick), silent)
    best = tmp_path / "run/best.safetensors"
    before = best.read_bytes()
    best.unlink()
    train(resumed(tmp_path / "run"), silent)
    assert best.read_bytes() == before


@pytest.fixture(scope="module")
def finished(tiny_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher, and a student's run that is over; its best epoch is not its last one."""
    root = tmp_path_factory.mktemp("finished")
    flags: Flags = {
        "data": str(tiny_set), "weights": "none", "base": "timm:test_resnet", "embedding_size": "8", "resize": "36",
        "image_size": "32", "batch": "8", "num_image_per_class": "2", "iter_per_epoch": "1", "epochs": "1",
        "keep_state": True, "workers": "0", "device": "cpu", "cache": "none",
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rkd_cli.training.loop.recall_at_k", lambda *_: {1: 0.5})
        train(teacher_run(flags, save_dir=str(root / "teacher")), silent)
        more: Flags = {"teacher_load": str(root / "teacher/best.safetensors"), "save_dir": str(root / "student")}
        train(build_run(resolve(DistillSettings, flags | more), silent), silent)
    return root


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("images", "the names or labels of the images changed since the run was stopped"),
        ("pixels", "the content of the images changed since the run was stopped. Restore them, or"),
        ("teacher", "the teacher changed since the run was stopped"),
        ("tensors", "wrong checksum"),
        ("header", "not a safetensors file, or damaged"),
        ("best", "best.safetensors: is missing"),
        ("flags", "--lr 0.5: the run in"),
    ],
)
def test_a_run_that_cannot_be_resumed_is_not_changed(finished: Path, tmp_path: Path, what: str, says: str) -> None:
    directory = shutil.copytree(finished / "student", tmp_path / "student")
    settings = json.loads((directory / "settings.json").read_text())
    data = shutil.copytree(settings["data"], tmp_path / "set")
    teacher = shutil.copy(finished / "teacher/best.safetensors", tmp_path)
    moved = settings | {"data": str(data), "teacher": str(teacher)}
    (directory / "settings.json").write_text(json.dumps(moved))
    state = directory / "state.safetensors"
    if what == "images":
        listing = data / "images.txt"
        name = listing.read_text().split()[1]
        (data / "images" / name).rename((data / "images" / name).with_name("other.jpg"))
        listing.write_text(listing.read_text().replace(name.split("/")[1], "other.jpg", 1))
    elif what == "pixels":
        for image in data.rglob("*.jpg"):
            Image.effect_noise((40, 40), 50).convert("RGB").save(image)
    elif what == "teacher":
        shutil.copy(finished / "student/best.safetensors", teacher)
    elif what == "tensors":
        damaged = bytearray(state.read_bytes())
        damaged[-5] ^= 1
        state.write_bytes(damaged)
    elif what == "header":
        state.write_bytes(state.read_bytes()[:-9])
    elif what == "best":
        (directory / "best.safetensors").unlink()
    before = contents(directory)
    assert "result.json" in before
    flags: Flags = {"save_dir": str(directory), "resume": True, "epochs": "9", "cache": "disk"}
    flags |= {"cache_dir": str(tmp_path / "cache")} | ({"lr": "0.5"} if what == "flags" else {})
    with pytest.raises(RkdError) as caught:
        train(build_run(resolve(DistillSettings, flags), silent), silent)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert contents(directory) == before
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("version", ["this", "earlier"])
def test_a_run_is_resumed_with_copies_of_its_images(finished: Path, tmp_path: Path, version: str) -> None:
    directory = shutil.copytree(finished / "student", tmp_path / "student")
    settings = json.loads((directory / "settings.json").read_text())
    data = shutil.copytree(settings["data"], tmp_path / "set", copy_function=shutil.copyfile)  # times and all are new
    (directory / "settings.json").write_text(json.dumps(settings | {"data": str(data)}))
    state, tensors = directory / "state.safetensors", load_file(directory / "state.safetensors")
    position = read_position(state)
    assert {*position.inputs} == {"teacher", "images", "content"}
    if version == "earlier":
        fewer = {name: digest for name, digest in position.inputs.items() if name != "content"}
        save_described(state, tensors, position.model_copy(update={"inputs": fewer}))
    events: list[Event] = []
    flags: Flags = {"save_dir": str(directory), "resume": True, "epochs": "2"}
    train(build_run(resolve(DistillSettings, flags), events.append), silent)
    said = f"{directory}: an earlier version started this run and stored no digest of the image content"
    notes = [event.text for event in events if isinstance(event, Note) and event.text.startswith(said)]
    assert len(notes) == (version == "earlier")
    assert read_position(state).inputs == position.inputs


def test_a_finished_run_drops_its_state_and_says_how_to_train_longer(rkd: Rkd, quick: Flags, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    train(teacher_run({**quick, "keep_state": False}), silent)
    assert not (directory / "state.safetensors").exists()
    before = contents(directory)
    code, out, err = rkd("train-teacher", "--resume", "--save-dir", directory)
    assert (code, out, err) == (0, f"{directory}: is finished, nothing to resume\n", "")
    assert (directory / "README.md").exists()
    code, _, err = rkd("train-teacher", "--resume", "--save-dir", directory, "--epochs", 2)
    assert code == 2
    assert f"--load {directory / 'last.safetensors'}, or repeat it with --keep-state" in err
    assert {name: data for name, data in contents(directory).items() if name != "README.md"} == before


def test_a_kept_state_lets_a_finished_run_train_longer(quick: Flags, tmp_path: Path) -> None:
    train(teacher_run(quick), silent)
    result = train(resumed(tmp_path / "run", epochs="2"), silent)
    assert result.result.ended_at is None
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 3
    assert (tmp_path / "run/state.safetensors").exists()


def test_what_finished_runs_no_longer_need_is_listed_and_removed(rkd: Rkd, quick: Flags, tmp_path: Path) -> None:
    done, stopped = tmp_path / "runs/done", tmp_path / "runs/stopped"
    train(teacher_run(quick, save_dir=str(done)), silent)
    shutil.copytree(done, stopped)
    (stopped / "result.json").unlink()
    (stopped / ".last.safetensors.7.part").write_bytes(bytes(5000))
    sizes = {path: path.stat().st_size for folder in (done, stopped) for path in folder.iterdir()}
    spare = sizes[done / "state.safetensors"] + 5000
    code, out, _ = rkd("cache", tmp_path / "runs")
    assert code == 0
    assert f"2 runs, {sum(sizes.values()) / 1e6:.1f} MB, {spare / 1e6:.1f} MB may go (--clear removes it)" in out
    code, _, err = rkd("cache", "nowhere", tmp_path / "runs", tmp_path / "runs/done/nothing", "--clear")
    assert (code, err.count("no run directory")) == (2, 2) and "nowhere: " in err
    assert all(path.exists() for path in sizes)
    assert rkd("cache", tmp_path / "runs", "--clear")[0] == 0
    gone = {path for path in sizes if not path.exists()}
    assert gone == {done / "state.safetensors", stopped / ".last.safetensors.7.part"}
    code, _, err = rkd("cache", tmp_path / "runs", "--cache-dir", tmp_path)
    assert (code, err) == (2, "rkd: error: --cache-dir: has no effect with FOLDER. Omit one of them.\n")
    code, _, err = rkd("cache", tmp_path)
    assert code == 0
    code, _, err = rkd("cache", done / "nothing")
    assert code == 2 and "no run directory" in err
