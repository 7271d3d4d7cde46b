"""The training loop: schedule, saving, best epoch, reproducibility, and that both steps learn what they should."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

from rkd_cli.data import load_dataset
from rkd_cli.data.augment import jitter, mixup
from rkd_cli.data.loader import Batch
from rkd_cli.embedding.batches import embed
from rkd_cli.errors import Interrupted, RkdError, RunError, SettingsError
from rkd_cli.events import Event, Note, RunDone, RunStarted, StepDone, TeacherEvaluated, silent
from rkd_cli.losses import RKDAngle, RKDDistance, TripletLoss
from rkd_cli.metrics import map_at_r, r_precision, recall_at_k
from rkd_cli.mining import AllPairs
from rkd_cli.models import backbones, load_model
from rkd_cli.models.normalization import Normalization
from rkd_cli.report.text import ended_lines
from rkd_cli.runtime.distributed import ALONE
from rkd_cli.schemas import EpochDone
from rkd_cli.settings import DistillSettings, TeacherSettings
from rkd_cli.settings.resolve import check_effect, resolve
from rkd_cli.training.images import split_images
from rkd_cli.training.loop import Run, train
from rkd_cli.training.open import build_run
from rkd_cli.training.schedule import step_rate
from rkd_cli.training.teachers import LiveTeacher

Flags = dict[str, str | bool]


@pytest.fixture
def flags(tiny_set: Path, tmp_path: Path) -> Flags:
    return {
        "data": str(tiny_set), "weights": "none", "base": "timm:test_resnet", "embedding_size": "8", "resize": "36",
        "image_size": "32", "batch": "8", "num_image_per_class": "2", "iter_per_epoch": "3", "epochs": "2",
        "keep_state": True, "workers": "0", "device": "cpu", "save_dir": str(tmp_path / "run"),
    }  # fmt: skip


def teacher_run(flags: Flags, **more: str | bool) -> Run:
    return build_run(resolve(TeacherSettings, flags | more), silent)


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_model(path).state_dict()


@pytest.mark.parametrize(("epoch", "expected"), [(1, 1.0), (24, 1.0), (25, 0.5), (29, 0.5), (30, 0.25), (40, 0.125)])
def test_the_rate_falls_at_the_start_of_each_milestone(epoch: int, expected: float) -> None:
    assert step_rate(1.0, 0.5, (25, 30, 35), epoch, 1) == expected


def test_epochs_are_evaluated_saved_and_reported_in_order(flags: Flags, tmp_path: Path) -> None:
    events: list[Event] = []
    done = train(teacher_run(flags, lr_decay_epochs="2", lr="1e-3"), events.append)
    assert isinstance(events[0], RunStarted)
    assert events[-1] is done
    epochs = [event for event in events if isinstance(event, EpochDone)]
    assert [row.epoch for row in epochs] == [0, 1, 2]
    assert [row.learning_rate for row in epochs] == [0.0, 1e-3, 5e-4]
    assert epochs[0].is_best
    assert epochs[0].losses == {}
    assert all(list(row.figures["train"]) == ["R@1", "R@2", "R@4", "R@8"] for row in epochs)
    best_so_far = 0.0
    for row in epochs:
        assert row.is_best == (row.epoch == 0 or row.figures["eval"]["R@1"] > best_so_far)
        best_so_far = max(best_so_far, row.figures["eval"]["R@1"])
    assert done.result.best["eval"]["R@1"] == best_so_far
    assert done.result.best_train["R@1"] == max(row.figures["train"]["R@1"] for row in epochs)
    saved = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["losses"] for row in saved] == [dict(row.losses) for row in epochs]
    assert [row["figures"]["eval"]["R@4"] for row in saved] == [row.figures["eval"]["R@4"] for row in epochs]


def test_best_stays_while_last_is_replaced(flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recalls = iter([0.1, 0.1, 0.1, 0.5, 0.1, 0.5, 0.1, 0.2])  # train and eval in turn, four epochs

    monkeypatch.setattr("rkd_cli.training.loop.recall_at_k", lambda *_: {1: next(recalls)})
    result = train(teacher_run(flags, epochs="3", lr="1e-2"), silent).result
    assert (result.best_epoch, result.best["eval"], result.final["eval"]) == (1, {"R@1": 0.5}, {"R@1": 0.2})
    best, last = weights(tmp_path / "run/best.safetensors"), weights(tmp_path / "run/last.safetensors")
    assert not torch.equal(best["linear.weight"], last["linear.weight"])
    monkeypatch.undo()
    train(teacher_run(flags, epochs="1", lr="1e-2", save_dir=str(tmp_path / "one")), silent)
    for name, tensor in weights(tmp_path / "one/last.safetensors").items():
        assert torch.equal(tensor, best[name]), "epoch 2 and 3 must not have touched the best of epoch 1"


def test_a_step_is_adam_on_the_sum_of_the_terms(flags: Flags) -> None:
    """Three steps of the loop equal three written out by hand."""
    run = teacher_run(flags, epochs="1", sample="all", lr="1e-3")
    twin = teacher_run(flags | {"overwrite": True}, epochs="1", sample="all", lr="1e-3").model
    assert all(torch.equal(a, b) for a, b in zip(run.model.parameters(), twin.parameters(), strict=True))
    batches = list(run.loader.epoch(1))
    seen: list[Event] = []
    train(run, seen.append)
    adam = torch.optim.Adam(twin.parameters(), lr=1e-3, weight_decay=1e-5, fused=True)
    criterion = TripletLoss(2, 0.2, AllPairs())
    losses = []
    twin.train()
    for batch in batches:
        loss = criterion(twin(batch.images), batch.labels)
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.item())
    assert all(torch.equal(a, b) for a, b in zip(run.model.parameters(), twin.parameters(), strict=True))
    done = [event for event in seen if isinstance(event, EpochDone)][1]
    assert done.losses["l2_triplet"] == pytest.approx(sum(losses) / 3, rel=1e-6)


def test_the_steps_of_an_epoch_take_the_rate_of_that_epoch(flags: Flags, tmp_path: Path) -> None:
    """The third epoch's rate is too small to move a float; the ones before it are not."""
    more = {"lr": "1e-2", "lr_decay_epochs": "3", "lr_decay_gamma": "1e-25", "base": "shufflenet_v2_x0_5"}
    parameters = [name for name, _ in teacher_run(flags, **more).model.named_parameters()]
    after = {}
    for epochs in ("1", "2", "3"):
        directory = tmp_path / epochs
        train(teacher_run(flags, **more, epochs=epochs, save_dir=str(directory)), silent)
        after[epochs] = weights(directory / "last.safetensors")
    for name in parameters:
        assert not torch.equal(after["1"][name], after["2"][name])
        assert torch.equal(after["2"][name], after["3"][name])


def test_the_second_epoch_is_adam_at_half_the_rate(flags: Flags) -> None:
    """Two epochs of the loop equal two written out by hand."""
    more: Flags = {"epochs": "2", "iter_per_epoch": "2", "sample": "all", "lr": "1e-3", "lr_decay_epochs": "2"}
    run = teacher_run(flags, **more)
    twin = teacher_run(flags, **more, overwrite=True).model
    batches = {epoch: list(run.loader.epoch(epoch)) for epoch in (1, 2)}
    train(run, silent)
    adam = torch.optim.Adam(twin.parameters(), lr=1e-3, weight_decay=1e-5, fused=True)
    twin.train()
    for epoch, rate in ((1, 1e-3), (2, 0.5e-3)):
        adam.param_groups[0]["lr"] = rate
        for batch in batches[epoch]:
            loss = TripletLoss(2, 0.2, AllPairs())(twin(batch.images), batch.labels)
            adam.zero_grad()
            loss.backward()
            adam.step()
    assert all(torch.equal(a, b) for a, b in zip(run.model.parameters(), twin.parameters(), strict=True))


def test_steps_are_adamw_at_the_rates_of_the_schedule_on_augmented_images(flags: Flags) -> None:
    """Two epochs of the loop equal two written out by hand."""
    more: Flags = {
        "epochs": "2", "iter_per_epoch": "2", "sample": "all", "lr": "1e-2", "optimizer": "adamw", "schedule": "cosine",
        "warmup": "1", "weight_decay": "0.5", "jitter": "0.4",
    }  # fmt: skip
    run = teacher_run(flags, **more)
    twin = teacher_run(flags, **more, overwrite=True).model
    batches = {epoch: list(run.loader.epoch(epoch)) for epoch in (1, 2)}
    seen: list[Event] = []
    train(run, seen.append)
    adamw = torch.optim.AdamW(twin.parameters(), lr=1.0, weight_decay=0.5, fused=True)
    twin.train()
    rates = iter([0.5e-2, 1e-2, 1e-2, 0.5e-2])
    for epoch in (1, 2):
        for step, batch in enumerate(batches[epoch], 1):
            adamw.param_groups[0]["lr"] = next(rates)
            run.context.seed_torch("step", epoch, step)
            images = jitter(batch.images, 0.4, torch.default_generator)
            assert not torch.equal(images, batch.images)
            loss = TripletLoss(2, 0.2, AllPairs())(twin(images), batch.labels)
            adamw.zero_grad()
            loss.backward()
            adamw.step()
    for ours, theirs in zip(run.model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)  # half of a cosine is no round number
    assert [event.learning_rate for event in seen if isinstance(event, EpochDone)] == pytest.approx([0, 1e-2, 0.5e-2])
    told = {(event.epoch, event.step): event.learning_rate for event in seen if isinstance(event, StepDone)}
    assert [told[1, 2], told[2, 2]] == pytest.approx([1e-2, 0.5e-2])


def test_the_papers_rates_of_a_teacher_and_a_student() -> None:
    teacher, student = TeacherSettings(), DistillSettings(teacher="t")

    def rates(settings: TeacherSettings | DistillSettings, *epochs: int) -> list[float]:
        falls = settings.lr_decay_epochs
        return [step_rate(settings.lr, settings.lr_decay_gamma, falls, epoch, 1) for epoch in epochs]

    assert rates(teacher, 1, 24, 25, 30, 35, 40) == pytest.approx([1e-5, 1e-5, 5e-6, 2.5e-6, 1.25e-6, 1.25e-6])
    assert rates(student, 1, 39, 40, 60, 80) == pytest.approx([1e-4, 1e-4, 1e-5, 1e-6, 1e-6])


def test_the_same_seed_gives_the_same_weights_with_any_number_of_workers(flags: Flags, tmp_path: Path) -> None:
    found = {}
    for name, workers, seed in (("a", "0", "1"), ("b", "2", "1"), ("c", "0", "2")):
        train(teacher_run(flags, workers=workers, seed=seed, save_dir=str(tmp_path / name)), silent)
        found[name] = weights(tmp_path / name / "last.safetensors")
    assert all(torch.equal(found["a"][key], found["b"][key]) for key in found["a"])
    assert not torch.equal(found["a"]["linear.weight"], found["c"]["linear.weight"])


@pytest.fixture
def teacher(flags: Flags, tmp_path: Path) -> Path:
    train(teacher_run(flags, save_dir=str(tmp_path / "teacher"), epochs="1", embedding_size="16"), silent)
    return tmp_path / "teacher/last.safetensors"


def test_teacher_and_student_see_the_same_view(flags: Flags, teacher: Path) -> None:
    more: Flags = {"teacher_load": str(teacher), "jitter": "0.3", "mixup": "1", "epochs": "1", "iter_per_epoch": "2"}
    run = build_run(resolve(DistillSettings, flags | more), silent)
    assert isinstance(run.teacher, LiveTeacher)
    batches = list(run.loader.epoch(1))
    views: dict[str, list[torch.Tensor]] = {"teacher": [], "student": []}
    run.teacher.network.register_forward_pre_hook(lambda _, given: views["teacher"].append(given[0]))
    run.model.register_forward_pre_hook(
        lambda module, given: views["student"].append(given[0]) if module.training else None
    )
    train(run, silent)
    taught, learned = views["teacher"][-2:], views["student"]
    assert len(learned) == 2
    for step, (batch, one, other) in enumerate(zip(batches, taught, learned, strict=True), 1):
        run.context.seed_torch("step", 1, step)
        expected = mixup(jitter(batch.images, 0.3, torch.default_generator), 1.0, torch.default_generator)
        assert torch.equal(one, expected)
        assert torch.equal(other, expected)


def test_distillation_holds_the_student_to_the_teachers_relations(flags: Flags, teacher: Path) -> None:
    more: Flags = {"teacher_load": str(teacher), "triplet_ratio": "0.5", "triplet_sample": "all", "lr": "1e-3"}
    run = build_run(resolve(DistillSettings, flags | more), silent)
    assert isinstance(run.teacher, LiveTeacher)
    frozen = run.teacher.network
    before = {name: tensor.clone() for name, tensor in frozen.state_dict().items()}
    batch = next(run.loader.epoch(1))
    run.model.eval()
    terms = run.step(batch, 1)
    with torch.no_grad():
        student, taught = run.model(batch.images), load_model(teacher)(batch.images)
    expected = {
        "dist": RKDDistance()(student, taught),
        "angle": 2 * RKDAngle()(student, taught),
        "triplet": 0.5 * TripletLoss(2, 0.2, AllPairs())(student, batch.labels),
    }
    assert {name: term.item() for name, term in terms.items()} == {
        n: pytest.approx(v.item(), rel=1e-4)
        for n, v in expected.items()  # folded batch norms round otherwise
    }

    events: list[Event] = []
    train(run, events.append)
    (measured,) = (event for event in events if isinstance(event, TeacherEvaluated))
    assert measured.figures.keys() == {"train", "eval"}
    for split, recalls in measured.figures.items():
        loader = run.evaluation[split]
        found = recall_at_k(*embed(frozen, loader, len(loader.images), run.context, silent, ""), run.ks)
        assert recalls == {f"R@{k}": recall for k, recall in found.items()}
    assert not frozen.training
    assert all(torch.equal(before[name], tensor) for name, tensor in frozen.state_dict().items())
    assert all(parameter.grad is None for parameter in frozen.parameters())


def test_terms_of_no_weight_are_left_out(flags: Flags, teacher: Path) -> None:
    more: Flags = {"teacher_load": str(teacher), "angle_ratio": "0"}
    run = build_run(resolve(DistillSettings, flags | more), silent)
    assert set(run.step(next(run.loader.epoch(1)), 1)) == {"dist"}


def test_training_learns(flags: Flags, tmp_path: Path) -> None:
    more = {"iter_per_epoch": "15", "epochs": "3", "lr": "1e-3", "sample": "all"}
    train(teacher_run(flags, **more), silent)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["losses"]["l2_triplet"] < 0.7 * rows[1]["losses"]["l2_triplet"]
    assert rows[-1]["figures"]["train"]["R@1"] > rows[0]["figures"]["train"]["R@1"]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_term_that_is_not_finite_is_named_and_nothing_is_overwritten(
    flags: Flags, tmp_path: Path, bad: float
) -> None:
    run = teacher_run(flags)
    files: dict[str, bytes] = {}
    calls = 0

    def step(batch: Batch, epoch: int) -> dict[str, torch.Tensor]:
        nonlocal calls
        calls += 1
        if calls == 5:  # the epoch before is saved
            files.update({path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()})
        good = run.model(batch.images).square().mean()
        return {"good": good, "bad": good * (bad if calls == 5 else 1)}

    with pytest.raises(RunError, match=rf"epoch 2, step 2: the bad loss is {bad}"):
        train(replace(run, step=step), silent)
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == files


def test_an_update_that_breaks_the_network_is_not_saved(flags: Flags, tmp_path: Path) -> None:
    """Every loss is finite, the last step's update is not: NaN embeddings must pass neither for hits nor for best."""
    run = teacher_run(flags, iter_per_epoch="1", epochs="1", lr="1e30", sample="random")
    with pytest.raises(RunError, match="the network's embeddings are not finite"):
        train(run, silent)
    rows = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert len(rows) == 1
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "run/last.safetensors").values())


def test_losses_are_reported_while_an_epoch_runs(flags: Flags) -> None:
    events: list[Event] = []
    train(teacher_run(flags, iter_per_epoch="12"), events.append)
    steps = [event for event in events if isinstance(event, StepDone)]
    assert steps[-1].step == 12
    done = [event for event in events if isinstance(event, EpochDone)][-1]
    assert steps[-1].losses == pytest.approx(done.losses)
    assert all(0 < step.losses["l2_triplet"] < 10 for step in steps)
    assert isinstance(events[-1], RunDone)


def test_losses_are_read_four_times_a_second_at_most(quick: Flags) -> None:
    run, now = teacher_run(quick, iter_per_epoch="7"), 0.0

    def step(batch: Batch, epoch: int) -> dict[str, torch.Tensor]:
        nonlocal now
        now += 0.125
        return run.step(batch, epoch)

    events: list[Event] = []
    train(replace(run, step=step, context=replace(run.context, clock=lambda: now)), events.append)
    assert [event.step for event in events if isinstance(event, StepDone)] == [2, 4, 6, 7]


def test_arithmetic_that_gives_up_says_where(flags: Flags) -> None:
    run = teacher_run(flags)

    def step(batch: Batch, epoch: int) -> dict[str, torch.Tensor]:
        raise FloatingPointError("the weights are not numbers")

    with pytest.raises(RunError, match=r"^epoch 1, step 1: the weights are not numbers"):
        train(replace(run, step=step), silent)


def test_an_epochs_seconds_are_those_since_the_one_before(flags: Flags) -> None:
    run, now = teacher_run(flags), 0.0
    learned = run.step

    def step(batch: Batch, epoch: int) -> dict[str, torch.Tensor]:
        nonlocal now
        now += 10 * epoch
        return learned(batch, epoch)

    events: list[Event] = []
    train(replace(run, step=step, context=replace(run.context, clock=lambda: now)), events.append)
    assert [event.seconds for event in events if isinstance(event, EpochDone)] == [0, 30, 60]


def test_batches_are_bytes_with_their_labels(flags: Flags) -> None:
    run = teacher_run(flags)
    batch = next(run.loader.epoch(1))
    assert (batch.images.shape, batch.images.dtype) == ((8, 3, 32, 32), torch.uint8)
    labels = batch.labels.tolist()
    assert sorted(labels) == sorted(label for label in set(labels) for _ in range(2))
    evaluation = run.evaluation["eval"]
    seen = torch.cat([batch.labels for batch in evaluation])
    assert seen.tolist() == list(evaluation.images.labels or ())


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_trains_on_cuda(flags: Flags, precision: str) -> None:
    result = train(teacher_run(flags, device="cuda", precision=precision), silent).result
    assert 0 <= result.best["eval"]["R@1"] <= 1


def test_fewer_evaluations_where_asked(flags: Flags, tmp_path: Path) -> None:
    events: list[Event] = []
    result = train(teacher_run(flags, epochs="5", eval_every="2", eval_train=False), events.append).result
    rows = [event for event in events if isinstance(event, EpochDone)]
    assert [row.epoch for row in rows if row.figures] == [0, 2, 4, 5]
    assert not any("train" in row.figures for row in rows)
    assert not any(row.is_best for row in rows if not row.figures)
    assert result.best_train == {}
    saved = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [bool(row["figures"]) for row in saved] == [True, False, True, False, True, True]
    seldom = weights(tmp_path / "run/last.safetensors")
    events.clear()
    every = train(teacher_run(flags, epochs="5", overwrite=True), events.append).result
    assert every.final["eval"] == result.final["eval"]
    measured = {event.epoch: event.figures["eval"] for event in events if isinstance(event, EpochDone)}
    found = {row.epoch: row.figures["eval"] for row in rows if row.figures}
    assert found == {n: measured[n] for n in (0, 2, 4, 5)}
    assert result.best["eval"]["R@1"] == max(measured[n]["R@1"] for n in (0, 2, 4, 5))
    often = weights(tmp_path / "run/last.safetensors")
    assert seldom.keys() == often.keys()
    assert all(torch.equal(seldom[name], often[name]) for name in often)


@pytest.mark.parametrize("cache", ["none", "disk"])
@pytest.mark.parametrize("workers", ["0", "2"])
def test_the_cache_and_the_workers_change_no_bit(flags: Flags, tmp_path: Path, cache: str, workers: str) -> None:
    train(teacher_run(flags, cache="none"), silent)
    more = {
        "cache": cache,
        "workers": workers,
        "cache_dir": str(tmp_path / "cache"),
        "save_dir": str(tmp_path / "other"),
    }
    train(teacher_run(flags, **more), silent)
    assert (tmp_path / "cache").exists() == (cache == "disk")
    one, other = weights(tmp_path / "run/last.safetensors"), weights(tmp_path / "other/last.safetensors")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_channels_last_changes_the_losses_by_rounding_alone(flags: Flags) -> None:
    def losses(memory_format: torch.memory_format) -> list[float]:
        run = teacher_run(flags, epochs="1", iter_per_epoch="4", lr="1e-5", sample="all", overwrite=True)
        run.model.to(memory_format=memory_format)
        seen: list[float] = []
        for batch in run.loader.epoch(1):
            terms = run.step(batch._replace(images=batch.images.contiguous(memory_format=memory_format)), 1)
            run.optimizer.zero_grad()
            sum(terms.values()).backward()  # type: ignore[union-attr]
            run.optimizer.step()
            seen.append(float(terms["l2_triplet"].detach()))
        return seen

    one, other = losses(torch.channels_last), losses(torch.contiguous_format)
    assert one[0] == pytest.approx(other[0], rel=1e-5)
    assert one == pytest.approx(other, rel=1e-3)  # Adam's first steps make whole steps of roundings near zero


@pytest.mark.slow
def test_compiled_networks_learn_the_same(flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two layers: a C++ compiler takes seconds for each."""
    if shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler")

    def build() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1))

    own = {"build": build, "FEATURES": 8, "NORMALIZATION": Normalization(), "URL": None, "UNUSED": (), "renamed": dict}
    monkeypatch.setitem(backbones.OWN, "own", SimpleNamespace(**own))
    flags |= {"base": "own", "epochs": "1", "lr": "1e-4"}
    train(teacher_run(flags, save_dir=str(tmp_path / "teacher")), silent)
    more: Flags = {"teacher_load": str(tmp_path / "teacher/last.safetensors"), "overwrite": True}
    events: list[list[Event]] = [[], []]
    for compiled, seen in zip((False, True), events, strict=True):
        train(build_run(resolve(DistillSettings, flags | more | {"compile": compiled}), silent), seen.append)
    plain, fast = ([event for event in seen if isinstance(event, EpochDone)][1].losses for seen in events)
    assert dict(fast) == pytest.approx(dict(plain), rel=1e-2)


def test_a_machine_that_cannot_compile_says_so(flags: Flags, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> object:
        raise RuntimeError("no g++ here\nand a long story")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(
        SettingsError, match=r"^--compile: torch.compile fails on this machine \(no g\+\+ here\). Omit the flag.$"
    ):
        teacher_run(flags, compile=True)


def of_file(flags: Flags, network: nn.Module, tmp_path: Path) -> Flags:
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    return flags | {"weights": str(tmp_path / "weights.pth")}


@pytest.mark.parametrize("chunk", ["0", "4"])
def test_frozen_batch_norms_keep_their_statistics_while_their_weights_learn(
    flags: Flags, tmp_path: Path, chunk: str
) -> None:
    """Three steps of the loop equal three written out, with two learning rates."""
    flags = of_file(flags | {"base": "resnet18"}, torchvision.models.resnet18(), tmp_path)
    more: Flags = {"epochs": "1", "sample": "all", "lr": "1e-3", "freeze_bn": True, "backbone_lr": "1e-4"}
    run = teacher_run(flags, **more, chunk=chunk)
    twin = teacher_run(flags | {"overwrite": True}, **more).model
    before = {name: buffer.clone() for name, buffer in twin.named_buffers()}
    batches = list(run.loader.epoch(1))
    train(run, silent)
    groups: list[dict[str, Any]] = [
        {"params": list(twin.base.parameters()), "lr": 1e-4},
        {"params": list(twin.linear.parameters())},
    ]
    adam = torch.optim.Adam(groups, lr=1e-3, weight_decay=1e-5, fused=True)
    criterion = TripletLoss(2, 0.2, AllPairs())
    twin.eval()  # of a ResNet nothing but batch norms tells the modes apart
    for batch in batches:
        adam.zero_grad()
        criterion(twin(batch.images), batch.labels).backward()
        adam.step()
    assert all(torch.equal(buffer, before[name]) for name, buffer in run.model.named_buffers())
    ours, written_out = (torch.cat([p.flatten() for p in network.parameters()]) for network in (run.model, twin))
    # norms are computed within convolutions; Adam turns the rounding of a gradient near 0 into a whole step
    assert ((ours - written_out).abs() > 1e-6).float().mean() < 1e-4
    assert bool((twin.get_parameter("base.bn1.weight") != 1).any())


def test_frozen_batch_norms_need_batch_norms(flags: Flags, tmp_path: Path) -> None:
    flags = of_file(flags, torchvision.models.squeezenet1_1(), tmp_path)
    with pytest.raises(SettingsError, match="--freeze-bn: squeezenet1_1 has no batch norm"):
        teacher_run(flags, base="squeezenet1_1", freeze_bn=True)


def test_batch_norms_of_random_weights_are_not_frozen(flags: Flags) -> None:
    events: list[Event] = []
    run = build_run(resolve(TeacherSettings, flags | {"freeze_bn": True}), events.append)
    assert not run.freeze_bn
    assert any("batch norms are trained" in event.text for event in events if isinstance(event, Note))
    with pytest.raises(SettingsError, match="--freeze-bn: has no effect with --weights none"):
        check_effect(TeacherSettings(weights="none", freeze_bn=True), ["weights", "freeze_bn"])
    check_effect(TeacherSettings(weights="none", load=Path("l"), freeze_bn=True), ["load", "freeze_bn"])


def resumed(flags: Flags) -> Run:
    return build_run(resolve(TeacherSettings, {"resume": True, "save_dir": flags["save_dir"]}), silent)


def scripted(run: Run, recalls: Sequence[float], monkeypatch: pytest.MonkeyPatch) -> tuple[RunDone, list[Event]]:
    """The run, with these recalls of its evaluations in turn."""
    left, events = iter(recalls), list[Event]()
    monkeypatch.setattr("rkd_cli.training.loop.recall_at_k", lambda *_: {1: next(left)})
    return train(run, events.append), events


def test_patience_ends_a_run_that_has_stopped_improving(flags: Flags, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two evaluations without a better one; one that is equal is not better."""
    more: Flags = {"epochs": "9", "iter_per_epoch": "1", "eval_train": False, "patience": "2"}
    done, events = scripted(teacher_run(flags, **more), [0.1, 0.0, 0.2, 0.2, 0.1, 0.9], monkeypatch)
    assert [event.epoch for event in events if isinstance(event, EpochDone)] == [0, 1, 2, 3, 4]
    assert (done.result.best_epoch, done.result.ended_at, done.result.final["eval"]["R@1"]) == (2, 4, 0.1)
    (started,) = (event for event in events if isinstance(event, RunStarted))
    assert ended_lines(started, done) == ["ended early at epoch 4 of 9 (--patience): none was better than epoch 2"]
    again, events = scripted(resumed(flags), [], monkeypatch)
    assert again.result.model_copy(update={"seconds": 0.0}) == done.result.model_copy(update={"seconds": 0.0})


def test_patience_counts_evaluations_and_a_whole_run_has_not_ended_early(
    flags: Flags, monkeypatch: pytest.MonkeyPatch
) -> None:
    more: Flags = {"iter_per_epoch": "1", "eval_train": False, "eval_every": "2", "patience": "1"}
    done, events = scripted(teacher_run(flags, epochs="4", **more), [0.2, 0.1], monkeypatch)
    assert (done.result.best_epoch, done.result.ended_at) == (0, 2)
    more |= {"save_dir": str(flags["save_dir"]) + "-whole"}
    done, events = scripted(teacher_run(flags, epochs="3", **more), [0.2, 0.3, 0.1], monkeypatch)
    assert (done.result.best_epoch, done.result.ended_at) == (2, None)
    assert ended_lines(next(event for event in events if isinstance(event, RunStarted)), done) == []


def test_a_run_with_patience_that_is_stopped_ends_at_the_same_epoch(
    flags: Flags, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after every step or evaluation, and resumed."""
    more: Flags = {"epochs": "6", "iter_per_epoch": "1", "eval_train": False, "patience": "2"}
    recalls = [0.1, 0.3, 0.2, 0.3, 0.4]
    run = teacher_run(flags, **more)
    for _ in range(20):
        looks = iter([False] * 3)
        run = replace(run, context=replace(run.context, stop_requested=partial(next, looks, True)))
        done_epochs = len(run.directory.resumed.rows) if run.directory.resumed else 0
        try:
            done, _ = scripted(run, recalls[done_epochs:], monkeypatch)
            break
        except Interrupted:
            run = resumed(flags)
    assert (done.result.best_epoch, done.result.ended_at) == (1, 3)


@pytest.mark.parametrize(
    ("select_by", "name"), [("map@r", "MAP@R"), ("r-precision", "R-Precision"), ("recall@4", "R@4")]
)
def test_the_figure_that_is_asked_for_picks_the_best_epoch(flags: Flags, select_by: str, name: str) -> None:
    events: list[Event] = []
    run = teacher_run(flags, epochs="3", lr="1e-2", select_by=select_by, fold="2/2", num_image_per_class="2", batch="4")
    done = train(run, events.append)
    rows = [event for event in events if isinstance(event, EpochDone)]
    scores = [row.figures["val"][name] for row in rows]
    assert done.result.best_epoch == scores.index(max(scores))
    assert (done.result.selected_by, done.result.selected_on) == (name, "val")
    model = load_model(run.directory.path / "last.safetensors").eval()
    images = run.evaluation["val"]
    embeddings, labels = embed(model, images, len(images.images), run.context, silent, "")
    precision = r_precision(embeddings, labels) if name == "R-Precision" else map_at_r(embeddings, labels)
    expected = recall_at_k(embeddings, labels, (4,))[4] if name == "R@4" else precision
    assert scores[-1] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"patience": "2"}, "--patience 2: has no effect with 2 evaluations in 2 epochs"),
        ({"patience": "1", "eval_every": "2"}, "--patience 1: has no effect with 1 evaluations"),
        ({"select_by": "recall@3"}, "--select-by recall@3: is not measured. Add 3 to --recall."),
        ({"select_by": "accuracy"}, "--select-by: must be recall@K, map@r or r-precision, got accuracy"),
        ({"fold": "1/2", "select_on": "eval"}, "--fold 1/2: has no effect with --select-on eval"),
        ({"fold": "3/2"}, "--fold: must be I/N, as 1/3, with N of 2 or more and I from 1 to N, got 3/2"),
        ({"fold": "1/1"}, "--fold: must be I/N"),
        ({"fold": "1/3"}, "--fold 1/3: needs 6 training classes"),
    ],
)
def test_a_selection_without_effect_is_refused(flags: Flags, more: Flags, says: str) -> None:
    with pytest.raises(RkdError, match=re.escape(says)):
        teacher_run(flags, **more)


@pytest.mark.parametrize(("flag", "value"), [("fold", "1/2"), ("select_by", "map@r")])
def test_folds_and_figures_of_labels_need_labels(flags: Flags, flag: str, value: str) -> None:
    sets = tuple(load_dataset("cub200", Path(str(flags["data"]))))
    settings = resolve(DistillSettings, {"teacher": "t", "dataset": "images", flag: value})
    with pytest.raises(SettingsError, match=f"^--{flag.replace('_', '-')} {value}: needs class labels"):
        split_images(settings, (sets[0], sets[1]), (), ALONE, silent)


def test_a_run_that_stays_below_its_start_says_so_once(flags: Flags, monkeypatch: pytest.MonkeyPatch) -> None:
    recalls = iter([0.5, 0.4, 0.1, 0.3, 0.2])
    monkeypatch.setattr("rkd_cli.training.loop.recall_at_k", lambda *_: {1: next(recalls)})
    events: list[Event] = []
    train(teacher_run(flags, epochs="4", iter_per_epoch="1", eval_train=False), events.append)
    notes = [event.text for event in events if isinstance(event, Note) and "makes it worse" in event.text]
    assert len(notes) == 1 and "scored 50.00%" in notes[0] and "at most 40.00%" in notes[0]
    assert isinstance(events[events.index(Note(notes[0])) - 1], EpochDone), "after the third epoch, not at the end"
    assert sum(isinstance(event, EpochDone) for event in events[: events.index(Note(notes[0]))]) == 4
