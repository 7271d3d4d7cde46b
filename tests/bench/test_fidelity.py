"""Our loop beside the plain one: the same step, honest intervals, and results that outlive an interruption."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

import fidelity
from fidelity import (
    FidelitySettings,
    Interval,
    fidelity_text,
    interval_of,
    our_run,
    plain_student,
    run_fidelity,
    train_plain,
)
from rkd_cli.bench import textbook
from rkd_cli.errors import DataError, RunError, SettingsError
from rkd_cli.events import Event, Note, silent
from rkd_cli.models import build_model
from rkd_cli.models.checkpoint import save_model
from rkd_cli.schemas import Header
from rkd_cli.training.schedule import step_rate
from scripts import script

Job = tuple[str, int]
NAME = "resnet18"


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    """Its batch norms hold what a few batches left there, so that folding them has something to do."""
    model = build_model(NAME, 128, l2normalize=True).train()
    for _ in range(3):
        model(torch.rand(8, 3, 32, 32))
    header = Header(
        base=NAME, embedding_size=128, l2normalize=True, resize=36, image_size=32, mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.25, 0.5), dataset="cub200", epoch=0, train_recall={}, eval_recall={1: 0.25},
    )  # fmt: skip
    save_model(tmp_path / "teacher.safetensors", model.state_dict(), header)
    return tmp_path / "teacher.safetensors"


@pytest.fixture
def toy(tiny_set: Path, tmp_path: Path, teacher: Path) -> FidelitySettings:
    return FidelitySettings(
        quick=True, dataset="cub200", data=tiny_set, resize=36, image_size=32, workers=0, batch=8, jobs=2,
        num_image_per_class=2, iter_per_epoch=2, seeds=2, device="cpu", teacher=teacher, base=NAME,
        save_dir=tmp_path / "fidelity",
    )  # fmt: skip


def put(settings: FidelitySettings, side: str, seed: int, recalls: Sequence[float]) -> None:
    student = {"side": side, "seed": seed, "recalls": recalls, "losses": [0.1] * len(recalls), "seconds": 1.0}
    (settings.save_dir / f"{side}-{seed}.json").write_text(json.dumps(student))


def test_the_interval_is_students() -> None:
    # t of 7 degrees of freedom is 2.364624, of 1 it is 12.706205
    eight = interval_of([1, 2, 3, 4, 5, 6, 7, 8])
    half = 2.364624 * 2.449490 / 8**0.5
    assert (eight.mean, eight.low, eight.high) == pytest.approx((4.5, 4.5 - half, 4.5 + half), abs=1e-5)
    assert eight.excludes_zero
    two = interval_of([-1.0, 2.0])
    assert (two.mean, two.low, two.high) == pytest.approx((0.5, 0.5 - 12.706205 * 1.5, 0.5 + 12.706205 * 1.5), abs=1e-4)
    assert not two.excludes_zero
    assert Interval(-2.0, -3.0, -1.0).excludes_zero


def test_a_plain_step_has_the_loss_of_ours(toy: FidelitySettings, teacher: Path) -> None:
    run = our_run(toy, teacher, seed=3)
    student, step = plain_student(toy, teacher, seed=3)
    theirs = list(student.parameters())
    assert all(map(torch.equal, run.model.parameters(), theirs)), "both sides start from the same weights"
    assert all(weight.is_contiguous() for weight in theirs)
    batch = next(run.loader.epoch(1))
    run.model.train()
    student.train()
    ours = torch.stack(list(run.step(batch, 1).values())).sum()
    plain = step(run.model.normalize(batch.images).contiguous(), batch.labels)
    assert plain > 1e-3
    torch.testing.assert_close(plain, ours, rtol=1e-4, atol=0)


def test_a_plain_triplet_step_has_the_loss_of_ours(toy: FidelitySettings, tmp_path: Path) -> None:
    torch.save(build_model(NAME, 8, l2normalize=True).base.state_dict(), tmp_path / "weights.pth")
    weights = {"weights": str(tmp_path / "weights.pth"), "freeze_bn": True, "dimensions": 24}
    settings = toy.model_copy(update={"loss": "triplet", **weights})
    run = our_run(settings, None, seed=3)
    student, step = plain_student(settings, None, seed=3)
    assert all(map(torch.equal, run.model.parameters(), student.parameters()))
    batch = next(run.loader.epoch(1))
    student.eval()  # as frozen statistics are
    ours, plain = [], []
    for _ in range(60):  # each draws its negatives
        ours.append(sum(run.step(batch, 1).values()).item())  # type: ignore[union-attr]
        plain.append(step(run.model.normalize(batch.images).contiguous(), batch.labels).item())
    assert len(set(plain)) > 1
    assert sum(plain) == pytest.approx(sum(ours), rel=0.03)


def test_plain_batch_norms_are_frozen(toy: FidelitySettings) -> None:
    student, step = plain_student(toy.model_copy(update={"loss": "triplet"}), None, seed=1)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    batch = [(torch.rand(8, 3, 32, 32), torch.arange(8) // 2)]
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-3)
    textbook.train_epoch(student, step, batch, optimizer, freeze_bn=True)  # type: ignore[arg-type]
    changed = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    assert any(name.endswith("weight") for name in changed)
    assert not any("running" in name for name in changed)


def test_the_plain_loop_keeps_the_schedule_of_ours(
    toy: FidelitySettings, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []

    def epoch(
        network: object, step: object, loader: object, optimizer: torch.optim.Optimizer, freeze_bn: bool
    ) -> float:
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        return 0.5

    monkeypatch.setattr(textbook, "train_epoch", epoch)
    monkeypatch.setattr(textbook, "evaluate", lambda *_: {1: 0.1 * len(rates)})
    student = train_plain(toy.model_copy(update={"quick": False, "lr": 8e-3}), teacher, seed=1)
    assert rates == pytest.approx([step_rate(8e-3, 0.5, (5, 7), epoch, 1) for epoch in range(1, 9)])
    assert rates[3:7] == pytest.approx([8e-3, 4e-3, 4e-3, 2e-3])
    assert (student.best, student.last, student.losses) == (0.8, 0.8, [0.5] * 8)


def test_the_plain_batches_are_those_of_the_protocol() -> None:
    labels = [index // 6 for index in range(60)]  # ten classes
    batches = textbook.ClassBatches(labels, 18, 5, 50)
    random.seed(4)
    first = list(batches)
    assert len(first) == len(batches) == 50
    for batch in first:
        assert len(set(batch)) == 18
        assert sorted(Counter(labels[index] for index in batch).values()) == [3, 5, 5, 5]
    assert {label for batch in first for label in (labels[index] for index in batch)} == set(range(10))
    assert list(batches) != first
    random.seed(4)
    assert list(batches) == first


def test_training_goes_down_a_plain_epoch(toy: FidelitySettings, teacher: Path) -> None:
    student, step = plain_student(toy, teacher, seed=1)
    images, labels = torch.rand(8, 3, 32, 32), torch.arange(8)
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-3)
    same: list[tuple[torch.Tensor, torch.Tensor]] = [(images, labels)] * 4
    first, second = (textbook.train_epoch(student, step, same, optimizer) for _ in range(2))  # type: ignore[arg-type]
    assert second < first


def test_what_is_done_is_not_done_again(toy: FidelitySettings, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[Job]] = []

    def stopped_before_the_last(
        work: object, jobs: Sequence[Job], count: int, finished: Callable[[str, int], None]
    ) -> None:
        asked.append(list(jobs))
        for side, seed in jobs if len(asked) > 1 else jobs[:3]:
            put(toy, side, seed, [0.5, 0.25] if side == "ours" else [0.25, 0.125 * seed])
            finished(side, seed)
        if len(asked) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(fidelity, "_in_processes", stopped_before_the_last)
    with pytest.raises(KeyboardInterrupt):
        run_fidelity(toy, silent)
    seen: list[Event] = []
    result = run_fidelity(toy, seen.append)
    everything = [("ours", 1), ("plain", 1), ("ours", 2), ("plain", 2)]
    assert asked == [everything, everything[3:]]
    assert Note(f"3 of 4 students are in {toy.save_dir} already") in seen
    assert [student.seed for student in result.plain] == [1, 2]
    assert result.teacher == 0.25
    assert result.best == Interval(0.25, 0.25, 0.25)
    assert result.last.mean == pytest.approx((0.125 + 0.0) / 2)
    lines = fidelity_text(result).splitlines()
    assert lines[1].split() == ["1", "50.00", "25.00", "+25.00", "25.00", "12.50", "+12.50"]
    assert lines[3].split() == ["mean", "50.00", "25.00", "+25.00", "25.00", "18.75", "+6.25"]
    assert lines[-2].endswith("+25.00 points, 95 % interval +25.00 to +25.00, which excludes 0")
    assert lines[-1].endswith("which holds 0")


def test_results_of_other_settings_are_kept_apart(toy: FidelitySettings, monkeypatch: pytest.MonkeyPatch) -> None:
    def done(work: object, jobs: Sequence[Job], count: int, finished: Callable[[str, int], None]) -> None:
        for side, seed in jobs:
            put(toy, side, seed, [0.5])

    monkeypatch.setattr(fidelity, "_in_processes", done)
    run_fidelity(toy, silent)
    run_fidelity(toy.model_copy(update={"jobs": 1, "workers": 1, "seeds": 3}), silent)
    with pytest.raises(SettingsError, match="results of another lr: choose another"):
        run_fidelity(toy.model_copy(update={"lr": 1e-3}), silent)
    with pytest.raises(SettingsError, match="results of another teacher"):
        run_fidelity(toy.model_copy(update={"teacher": None}), silent)


def test_a_teacher_of_no_effect_is_refused(toy: FidelitySettings) -> None:
    with pytest.raises(SettingsError, match="--teacher: has no effect with --loss triplet"):
        run_fidelity(toy.model_copy(update={"loss": "triplet"}), silent)


def test_what_is_wrong_with_the_batch_is_said_first(toy: FidelitySettings) -> None:
    with pytest.raises(DataError, match="a batch of 500"):
        run_fidelity(toy.model_copy(update={"batch": 500}), silent)


def test_a_student_that_fails_ends_the_command() -> None:
    finished: list[Job] = []
    with pytest.raises(RunError, match="the plain student of seed 2 failed"):
        fidelity._in_processes(str.encode, [("plain", 2)], 1, lambda *job: finished.append(job))  # type: ignore[arg-type]
    assert not finished


@pytest.mark.slow
def test_the_script_trains_compares_and_goes_on(toy: FidelitySettings, tiny_set: Path) -> None:
    arguments = [
        "--json", "--quick", "--dataset", "cub200", "--data", str(tiny_set), "--resize", "36",
        "--image-size", "32", "--workers", "1", "--batch", "8", "--num-image-per-class", "2", "--iter-per-epoch", "2",
        "--seeds", "2", "--device", "cpu", "--save-dir", str(toy.save_dir), "--teacher-base", NAME, "--base", NAME,
    ]  # fmt: skip
    found = []
    for again in (False, True):
        if again:
            (toy.save_dir / "plain-2.json").unlink()
        found.append(json.loads(script("fidelity", *arguments)[0])["fidelity"])
    for side in ("ours", "plain"):
        assert [student["seed"] for student in found[0][side]] == [1, 2]
        for student in found[0][side]:
            assert len(student["recalls"]) == len(student["losses"]) == 1
            assert 0 < student["recalls"][0] <= 1
            assert 0 < student["losses"][0] < 1
    assert found[1]["ours"] == found[0]["ours"]
    assert found[1]["plain"][0] == found[0]["plain"][0]
    assert found[1]["plain"][1]["losses"] == found[0]["plain"][1]["losses"], "the same seed draws the same"
    difference = [a["recalls"][0] - b["recalls"][0] for a, b in zip(found[0]["ours"], found[0]["plain"], strict=True)]
    assert found[0]["best"]["mean"] == pytest.approx(sum(difference) / 2)
    assert {path.name for path in toy.save_dir.glob("*-*")} == {
        f"{s}-{n}.json" for s in ("ours", "plain") for n in (1, 2)
    }
    assert (toy.save_dir / "teacher/best.safetensors").exists()
