"""A dry run: what it says is what a run would do, what it refuses a run would refuse, and nothing is written."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock

from rkd_cli.data import load_dataset
from rkd_cli.data.loader import DeviceReader, EvalLoader
from rkd_cli.data.splits import relative_names
from rkd_cli.embedding.vectors import write_vectors
from rkd_cli.errors import DataError, RunError
from rkd_cli.events import ObjectiveFacts, silent
from rkd_cli.models import build_model
from rkd_cli.models.checkpoint import save_model
from rkd_cli.models.embedding_net import header_of
from rkd_cli.runtime.doctor import peak_memory
from rkd_cli.schemas import Position
from rkd_cli.settings import DistillSettings, TeacherSettings
from rkd_cli.settings.resolve import resolve
from rkd_cli.training import dry_run as dry_run_module
from rkd_cli.training import samples
from rkd_cli.training.dry_run import DryRun, _left, dry_run
from rkd_cli.training.loop import Run, train, train_step
from rkd_cli.training.open import build_run
from rkd_cli.training.samples import Samples, pace

Flags = dict[str, str | bool]
Rkd = Callable[..., tuple[int, str, str]]


@pytest.fixture
def flags(tiny_set: Path, tmp_path: Path) -> Flags:
    network = build_model("shufflenet_v2_x0_5", 5, True)
    header = header_of(network, "shufflenet_v2_x0_5", 36, 32, "cub200", "eval").model_copy(update={"epoch": 1})
    save_model(tmp_path / "teacher.safetensors", network.state_dict(), header)
    names = [name for images in load_dataset("cub200", tiny_set) for name in relative_names(images.paths, tiny_set)]
    rows = np.random.default_rng(0).normal(size=(len(names), 5)).astype(np.float32)
    write_vectors(tmp_path / "vectors.npz", rows, names)
    return {
        "data": str(tiny_set), "cache_dir": str(tmp_path / "cache"), "weights": "none", "base": "timm:test_resnet",
        "embedding_size": "8", "resize": "36", "image_size": "32", "batch": "8", "num_image_per_class": "2",
        "iter_per_epoch": "3", "epochs": "4", "lr": "1e-3", "workers": "0", "device": "cpu",
        "keep_state": True, "save_dir": str(tmp_path / "run"), "teacher": str(tmp_path / "teacher.safetensors"),
    }  # fmt: skip


def settings_of(flags: Flags) -> TeacherSettings | DistillSettings:
    return resolve(DistillSettings, flags) if "teacher" in flags else resolve(TeacherSettings, flags)


def tried(flags: Flags, **more: str | bool) -> DryRun:
    return dry_run([settings_of(flags | more)], silent)


def of_teacher(flags: Flags, **more: str | bool) -> Flags:
    return {name: value for name, value in flags.items() if name != "teacher"} | more


def begun(flags: Flags) -> Run:
    settings = settings_of(flags)
    if isinstance(settings, TeacherSettings):
        return build_run(settings, silent)
    return build_run(settings, silent)


def contents(folder: Path) -> dict[Path, tuple[int, int]]:
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")}


KINDS: dict[str, Flags] = {
    "live": {},
    "stream": {"cache": "none"},
    "hints": {"fitnet_ratio": "1", "hint_epochs": "1", "base": "shufflenet_v2_x0_5"},
    "views": {"teacher_views": "3"},
    "vectors": {"teacher": "vectors.npz", "match_ratio": "1"},
    "photos": {"labels": False, "select_on": "eval"},
    "val": {"select_on": "val", "num_image_per_class": "4"},
    "damaged": {"skip_damaged": True},
    "workers": {"workers": "1"},
}
TEACHERS: dict[str, Flags] = {"teacher": {"loss": "proxy_anchor"}, "frozen": {"freeze_base": True, "views": "2"}}


def flags_of(kind: str, flags: Flags, folder: Path) -> Flags:
    if kind in TEACHERS:
        return of_teacher(flags, **TEACHERS[kind])
    more = KINDS[kind]
    return flags | more | ({"teacher": str(folder / str(more["teacher"]))} if "teacher" in more else {})


@pytest.mark.parametrize("kind", [*KINDS, *TEACHERS])
def test_a_dry_run_says_what_the_run_is_and_writes_nothing(kind: str, flags: Flags, tmp_path: Path) -> None:
    flags = flags_of(kind, flags, tmp_path)
    before = contents(tmp_path)
    found = tried(flags)
    assert contents(tmp_path) == before
    run = begun(flags)
    expected = replace(run.started, reader=found.started.reader) if kind == "frozen" else run.started
    assert found.started == expected, "what a real run says when it starts, place of the pixels included"
    assert (found.batch, found.image_size, found.resized_to) == (8, 32, {})
    assert len(found.step_seconds) == (2 if kind == "hints" else 1)
    assert min(found.step_seconds) > 0 and found.evaluation_seconds > 0
    assert (found.teacher_seconds > 0) == (kind not in ("views", "vectors", *TEACHERS))
    assert found.memory and found.memory_total and 10**8 < found.memory < found.memory_total


@pytest.mark.parametrize("kind", ["live", "views", "frozen"])
def test_new_caches_are_counted_and_existing_ones_are_not(kind: str, flags: Flags, tmp_path: Path) -> None:
    flags = flags_of(kind, flags, tmp_path)
    found = tried(flags)
    begun(flags)
    cached = list((tmp_path / "cache").glob("*.pixels")), list((tmp_path / "cache").glob("*.vectors"))
    decoding = found.once["decoding"]
    assert (decoding.count, decoding.unit, decoding.folder) == (48, "images", tmp_path / "cache")
    assert decoding.bytes == sum(path.stat().st_size for path in cached[0])
    works = {name: work for name, work in found.once.items() if name != "decoding"}
    assert sum(work.bytes for work in works.values()) == sum(path.stat().st_size for path in cached[1])
    counts = {"live": {}, "views": {"computing the teacher's views": 24 * 3 + 48}, "frozen": {
        "computing features": 24 * 2 + 48
    }}  # fmt: skip
    assert {name: work.count for name, work in works.items()} == counts[kind]
    assert all(work.seconds > 0 for work in found.once.values())
    assert tried(flags).once == {}


def test_seeds_are_counted_together(flags: Flags, tmp_path: Path) -> None:
    """The decoded pixels and the teacher's center crops serve all, its views are those of one seed."""
    flags |= {"teacher_views": "2"}
    every = [settings_of(flags | {"seed": seed, "save_dir": str(tmp_path / f"run/{seed}")}) for seed in ("1", "2", "3")]
    found = dry_run(every, silent)
    assert {name: work.count for name, work in found.once.items()} == {
        "decoding": 48,
        "computing the teacher's views": 3 * 24 * 2 + 48,
    }
    assert len(found.seconds) == 3
    assert found.seconds[0] == found.seconds[1] == found.seconds[2]


@pytest.mark.parametrize(
    ("kind", "eval_every", "eval_train"),
    [
        ("live", "1", True),
        ("live", "3", False),
        ("hints", "3", False),
        ("photos", "1", True),
        ("val", "3", False),
        ("teacher", "3", True),
    ],
)
def test_the_steps_and_passes_counted_are_those_of_the_run(
    kind: str, flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, eval_every: str, eval_train: bool
) -> None:
    """Steps cost 1 (of hints 100), an image that is evaluated 10^4, one that the teacher is measured on 10^9."""
    run = begun(flags_of(kind, flags, tmp_path) | {"eval_every": eval_every, "eval_train": eval_train})
    costs = [100.0, 1.0] if kind == "hints" else [1.0]
    images = {name: len(loader.images) for name, loader in run.evaluation.items()}
    measured = sum(count for name, count in images.items() if name != "val" or kind == "photos")
    of_teacher = 1e9 * measured if run.teacher else 0.0
    predicted = _left(run, Position(), costs, 1e4 * sum(images.values()), of_teacher)

    spent: list[float] = []
    step, network = run.step, getattr(run.teacher, "network", None)
    passes = EvalLoader.__iter__

    def counted(batch: Any, epoch: int) -> dict[str, torch.Tensor]:
        spent.append(costs[0 if kind == "hints" and epoch <= 1 else -1])
        return step(batch, epoch)

    def evaluated(loader: EvalLoader) -> Iterator[Any]:
        spent.append((1e9 if network is not None and asked.pop(0) else 1e4) * len(loader.images))
        return passes(loader)

    # the teacher's passes are the first ones
    teachers = len([name for name in images if name != "val" or kind == "photos"]) if run.teacher else 0
    asked = [True] * teachers + [False] * 100
    monkeypatch.setattr(EvalLoader, "__iter__", evaluated)
    train(replace(run, step=counted), silent)
    assert predicted == sum(spent)


@pytest.mark.parametrize(
    ("kind", "eval_train", "of_teacher", "evaluated"),
    [
        ("live", True, 24 + 24, 24 + 24),
        ("live", False, 24, 24),
        ("photos", True, 24 + 24, 24 + 24),
        ("val", True, 12 + 24, 12 + 24 + 12),
        ("val", False, 24, 24 + 12),
        ("vectors", True, 0, 24 + 24),
    ],
)
def test_the_images_that_are_measured_are_counted(
    flags: Flags,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    eval_train: bool,
    of_teacher: int,
    evaluated: int,
) -> None:
    """An image costs a second, and the figures of a split one; a teacher is not measured on the validation split."""
    for module in (dry_run_module, samples):
        monkeypatch.setattr(module, "pace", lambda counts, context=None: float(next(iter(counts)) > 0))
    found = tried(flags_of(kind, flags, tmp_path) | {"eval_train": eval_train})
    assert found.teacher_seconds == of_teacher
    splits = 1 + eval_train + (kind == "val")
    assert found.evaluation_seconds == evaluated + splits


@pytest.mark.parametrize("hints", [None, 2, 9])
def test_what_is_left_of_a_run_is_counted_from_where_it_stands(hints: int | None) -> None:
    """Against a loop over the epochs."""
    facts = [ObjectiveFacts({"dist": 1.0}, count) for count in ([hints, None] if hints else [None])]
    for epochs, every, epoch, step in itertools.product((1, 5), (1, 2, 7), range(7), (0, 3)):
        if epoch > epochs + 1 or (step and not 1 <= epoch <= epochs):
            continue
        started = SimpleNamespace(objectives=facts)
        run: Any = SimpleNamespace(started=started, epochs=epochs, eval_every=every, loader=range(4), has_labels=True)
        at = Position(epoch=epoch, step=step)
        costs = [100.0, 1.0] if hints and hints < epochs else [100.0] if hints else [1.0]
        expected = 1e8 + 1e4 * (epoch == 0)
        for number in range(max(1, epoch), epochs + 1):
            cost = 100.0 if hints and number <= hints else 1.0
            expected += cost * (4 - (step if number == epoch else 0))
            expected += 1e4 * (number % every == 0 or number == epochs)
        assert _left(run, at, costs, 1e4, 1e8) == expected, (epochs, every, at)
        known = at.model_copy(update={"figures": {"eval": {"R@1": 0.5}}})
        assert _left(run, known, costs, 1e4, 1e8) == expected - 1e8


def test_what_is_left_of_a_stopped_run_is_less(flags: Flags) -> None:
    train(begun(flags | {"epochs": "2"}), silent)
    resumed: Flags = {"save_dir": flags["save_dir"], "resume": True}
    before = contents(Path(str(flags["save_dir"])))
    found = dry_run([resolve(DistillSettings, resumed | {"epochs": "4"})], silent)
    assert contents(Path(str(flags["save_dir"]))) == before
    assert found.started.resumed_at == (3, 0)
    assert found.weights == "of the run"
    expected = 2 * 3 * found.step_seconds[0] + 2 * found.evaluation_seconds
    assert list(found.seconds) == pytest.approx([expected])
    (nothing,) = dry_run([resolve(DistillSettings, resumed)], silent).seconds
    assert nothing == 0


def test_a_pace_is_that_of_the_later_half(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 9.0, 12.0, 14.0, 16.0, 99.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    monkeypatch.setattr(samples, "_SECONDS", 15.0)
    assert pace(itertools.repeat(2)) == (16 - 12) / 4
    clock = iter([0.0, 9.0])
    assert pace([3]) == 3.0


def test_the_time_and_memory_of_a_step_are_measured(
    flags: Flags, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    steps: list[tuple[int, int, int]] = []

    def slow(run: Run, batch: Any, epoch: int, step: int) -> dict[str, torch.Tensor]:
        steps.append((len(batch.images), epoch, step))
        time.sleep(0.2)
        return train_step(run, batch, epoch, step)

    monkeypatch.setattr(dry_run_module, "train_step", slow)
    found = tried(flags_of("hints", flags, tmp_path) | {"iter_per_epoch": "1"})
    assert steps == [(8, 1, 1), (8, 1, 1), (8, 2, 1), (8, 2, 1)], "whole batches, of both objectives, epochs over again"
    assert all(0.2 < seconds < 2 for seconds in found.step_seconds)


def test_the_peak_of_memory_stays_after_it_is_given_back() -> None:
    code = (
        "import numpy as np; from rkd_cli.runtime.doctor import peak_memory as peak\n"
        "before = peak(); large = np.ones(300 << 20, np.uint8); del large; grown = peak() - before\n"
        "assert 250 << 20 < grown < 350 << 20, grown"
    )
    if peak_memory() is None:
        pytest.skip("this system does not say")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_pixels_that_would_lie_on_the_device_are_counted(flags: Flags, monkeypatch: pytest.MonkeyPatch) -> None:
    run: Any = SimpleNamespace(
        context=SimpleNamespace(device=torch.device("cuda")), loader=SimpleNamespace(what=DeviceReader.what)
    )
    few = Samples()
    few.pixels_left_out = 5
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 10)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (50, 100))
    assert dry_run_module._memory(run, few) == (15, 100)
    run.loader.what = "from a file"
    assert dry_run_module._memory(run, few) == (10, 100)


def test_the_directory_takes_what_is_told(flags: Flags) -> None:
    found = tried(flags)
    train(begun(flags), silent)
    sizes = {path.name: path.stat().st_size for path in Path(str(flags["save_dir"])).iterdir()}
    largest = sum(sizes.values()) + sizes["state.safetensors"]  # which is written while the old one exists
    assert found.run_bytes == pytest.approx(largest, rel=0.02)


def test_a_disk_without_room_is_refused_as_by_the_run(flags: Flags, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("data.cache", "embedding.store"):
        monkeypatch.setattr(f"rkd_cli.{module}.free_space", lambda folder: 1000)
    with pytest.raises(RunError) as dry:
        tried(flags, cache="disk")
    with pytest.raises(RunError, match="the cache needs 0 MB, and 0 MB are free") as real:
        begun(flags | {"cache": "disk"})
    assert str(dry.value) == str(real.value)
    assert tried(flags).started.reader == "decoded in every epoch by 0 workers"
    with pytest.raises(RunError, match="Choose another --cache-dir, or fewer views"):
        tried(flags, teacher_views="3", cache="none")


def test_a_cache_folder_that_cannot_be_is_refused_as_by_the_run(flags: Flags, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for more in ({"cache": "disk"}, {"cache": "none", "teacher_views": "2"}):
        wrong = flags | more | {"cache_dir": str(tmp_path / "file/below")}
        with pytest.raises(RunError) as dry:
            tried(wrong)
        with pytest.raises(RunError, match="Not a directory") as real:
            begun(wrong)
        assert str(dry.value) == str(real.value)


def test_a_damaged_image_among_those_that_are_decoded_is_named(
    flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "set"
    subprocess.run(["cp", "-r", str(flags["data"]), str(data)], check=True)
    image = next(data.rglob("*.jpg"))
    image.write_bytes(image.read_bytes()[:300])
    flags |= {"data": str(data)}
    with monkeypatch.context() as patch:
        patch.setattr(samples, "_SECONDS", 10.0)  # all of them
        for workers in ("0", "1"):
            with pytest.raises(DataError, match=image.name):
                tried(flags, workers=workers)
    found = tried(flags, skip_damaged=True)
    assert found.once["looking for damaged images"].count == 48
    assert found.once["decoding"].count == 47


def test_the_demo_is_drawn_elsewhere_and_is_gone(flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rkd_cli.data.sets.demo.make_demo.__kwdefaults__", {
        "species": 8, "images": 4, "size": 24, "report": silent
    })  # fmt: skip
    before = contents(tmp_path)
    found = tried(of_teacher(flags, dataset="demo", data=str(tmp_path / "none")))
    assert [split.images for split in found.started.splits] == [16, 16]
    assert contents(tmp_path) == before


@pytest.mark.parametrize(("base", "resized_to"), [("maxvit_t", {"student": 224}), ("resnet18", {})])
def test_a_network_of_one_input_size_is_told(flags: Flags, base: str, resized_to: dict[str, int]) -> None:
    assert tried(flags, base=base).resized_to == resized_to


def words(flags: Flags) -> list[str]:
    return [
        "distill" if "teacher" in flags else "train-teacher",
        *(
            part
            for name, value in flags.items()
            for part in (f"--{name.replace('_', '-')}", *([] if value is True else [str(value)]))
        ),
    ]


def test_the_command_says_it_in_plain_lines(rkd: Rkd, flags: Flags, tmp_path: Path) -> None:
    before = contents(tmp_path)
    code, out, err = rkd(*words(flags), "--dry-run", "--log", "csv")
    assert (code, err) == (0, "")
    lines = dict(line.strip().split(": ", 1) for line in out.splitlines())
    assert lines["Distilling"] == "a dry run, nothing is written"
    assert lines["data"] == "cub200: 24 images of 4 classes train, 24 images of 4 classes evaluate"
    assert lines["student"] == "timm:test_resnet, 0.4 M parameters, 8-d, not normalized"
    assert lines["teacher"].startswith("shufflenet_v2_x0_5, 0.3 M parameters, 5-d, unit length, ")
    assert lines["loss"] == "1 dist + 2 angle"
    assert lines["weights"] == "random"
    assert lines["batches"] == "8 images of 32 pixels a side"
    assert lines["steps"] == "4 epochs of 3"
    assert lines["once"].startswith("decoding: 48 images, ")
    assert contents(tmp_path) == before
    code, quiet, _ = rkd(*words(flags), "--dry-run", "--quiet", "--seed", "1,2")
    assert code == 0
    assert lines["note"].startswith("the student timm:test_resnet has 0.4 M parameters, the teacher")
    first, second = ({line.split(": ")[0] for line in text.splitlines()} for text in (out, quiet))
    assert second == first - {"note"}
    assert "for each seed" in quiet and "for each seed" not in out
    assert contents(tmp_path) == before


def test_a_dry_run_is_no_setting(rkd: Rkd, flags: Flags, tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(json.dumps({"dry_run": True}))
    code, _, err = rkd("train-teacher", "--config", tmp_path / "c.json")
    assert (code, "unknown key dry_run" in err) == (2, True)


@pytest.mark.parametrize(
    "more",
    [
        {"base": "resnet81"},
        {"weights": "{tmp}/none.pth"},
        {"teacher": "{tmp}/none.safetensors"},
        {"data": "{tmp}/none"},
        {"save_dir": "{tmp}/used"},
        {"save_dir": "{tmp}/locked"},
        {"save_dir": "{tmp}/file"},
        {"save_dir": "{tmp}/file/below"},
        {"batch": "9"},
        {"csd_ratio": "1"},
        {"lr": "fast"},
        {"seed": "1,1"},
        {"log": "tensorboard"},
    ],
    ids=lambda more: " ".join(next(iter(more.items()))),
)
def test_a_refusal_is_the_line_of_the_run(
    rkd: Rkd, flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: Flags
) -> None:
    monkeypatch.setattr("rkd_cli.screen.loggers.find_spec", lambda name: None)
    for name in ("used", "locked"):
        (tmp_path / name).mkdir()
    (tmp_path / "used/metrics.jsonl").write_text("")
    (tmp_path / "file").write_text("")
    asked = words(flags | {name: str(value).format(tmp=tmp_path) for name, value in more.items()})
    with FileLock(tmp_path / "locked/.lock"):
        dry, real = rkd(*asked, "--dry-run"), rkd(*asked)
    assert dry == real
    assert (dry[0], len(dry[2].splitlines())) == (2, 1)


def test_the_directories_of_all_seeds_are_looked_at(rkd: Rkd, flags: Flags, tmp_path: Path) -> None:
    (tmp_path / "run/seed-3").mkdir(parents=True)
    (tmp_path / "run/seed-3/metrics.jsonl").write_text("")
    code, _, err = rkd(*words(flags), "--dry-run", "--seed", "1,2,3")
    assert (code, "seed-3: already has a run" in err) == (2, True)
