"""The benchmark runs, measures what it says, and its textbook agrees with ours."""

from __future__ import annotations

import json
import math
import mmap
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from forked import PIPED
from rkd_cli.bench import apart, textbook
from rkd_cli.bench.cases import cases
from rkd_cli.bench.measure import Measurement, Meter, allocated_peak, resident_peak
from rkd_cli.bench.suite import PARTS, run_bench
from rkd_cli.cli import main
from rkd_cli.data.decode import load_resized
from rkd_cli.errors import DataError
from rkd_cli.events import silent
from rkd_cli.losses import RKDAngle, RKDDistance, TripletLoss
from rkd_cli.metrics import recall_at_k
from rkd_cli.mining import AllPairs, SemiHardNegative
from rkd_cli.settings import BenchSettings

CPU = torch.device("cpu")


Formula = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@pytest.fixture
def quick(tmp_path: Path) -> BenchSettings:
    return BenchSettings(
        quick=True,
        data=tmp_path,
        batch=10,
        iter_per_epoch=2,
        repeats=1,
        resize=36,
        image_size=32,
        device="cpu",
        workers=0,
        teacher_base="shufflenet_v2_x0_5",
        base="shufflenet_v2_x0_5",
    )


@pytest.mark.parametrize("n", [5, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("ours", "formula"), [(RKDAngle(), textbook.angle_loss), (RKDDistance(), textbook.distance_loss)]
)
def test_the_textbook_losses_are_ours(n: int, dtype: torch.dtype, ours: torch.nn.Module, formula: Formula) -> None:
    student, teacher = torch.randn(n, 7, dtype=dtype, requires_grad=True), torch.randn(n, 30, dtype=dtype)
    (expected,) = torch.autograd.grad(formula(student, teacher), student)
    (found,) = torch.autograd.grad(ours(student, teacher), student)
    torch.testing.assert_close(ours(student, teacher), formula(student, teacher), rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("case", ["small", "paper64", "odd"])
def test_the_textbook_is_the_published_code(reference: np.lib.npyio.NpzFile, case: str) -> None:
    for kind, formula in (("rkd_angle", textbook.angle_loss), ("rkd_distance", textbook.distance_loss)):
        student, teacher = (torch.from_numpy(reference[f"{kind}/{case}/{who}"]) for who in ("student", "teacher"))
        assert formula(student, teacher).item() == pytest.approx(float(reference[f"{kind}/{case}/loss"]), rel=1e-5)


def test_the_textbook_triplets_and_recall_are_ours() -> None:
    x, labels = F.normalize(torch.randn(30, 6), dim=1), torch.arange(30) // 5
    for miner, formula in ((SemiHardNegative(), textbook.semihard_triplets), (AllPairs(), textbook.all_triplets)):
        ours, theirs = miner(x, labels), formula(x, labels)
        assert sorted(zip(*map(torch.Tensor.tolist, ours), strict=True)) == sorted(
            zip(*map(torch.Tensor.tolist, theirs), strict=True)
        )
    expected = textbook.triplet_loss(x, textbook.all_triplets(x, labels), 0.2)
    torch.testing.assert_close(TripletLoss(2, 0.2, AllPairs())(x, labels), expected)
    assert recall_at_k(x, labels, (1, 2, 4)) == pytest.approx(textbook.recall(x, labels, (1, 2, 4)), abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("part", list(PARTS))
def test_each_part_measures_something(part: str, quick: BenchSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apart, "subprocess", PIPED)
    rows = run_bench(quick, [part], silent)
    assert rows
    assert all(math.isfinite(row.seconds) and row.seconds > 0 for row in rows)
    if part != "recipe":
        assert any(row.faster for row in rows)
    if part in ("angle", "distance", "miners", "recall", "step", "epoch"):
        assert all(row.bytes is not None and row.textbook_bytes is not None for row in rows)


def test_batch_norms_are_frozen_in_our_trainings(quick: BenchSettings, tmp_path: Path) -> None:
    for case in cases(quick.model_copy(update={"freeze_bn": True}), tmp_path):
        model = case.run.model
        norms = [module.weight for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
        statistics, weights = ([tensor.clone() for tensor in tensors] for tensors in (model.buffers(), norms))
        case.step()
        assert all(map(torch.equal, model.buffers(), statistics))
        assert not any(map(torch.equal, norms, weights))


def test_a_ratio_is_textbook_over_ours() -> None:
    row = Measurement("w", 2.0, 8.0, 10, 30)
    assert (row.faster, row.leaner) == (4.0, 3.0)
    assert Measurement("w", 2.0).faster is None


def test_the_time_is_that_of_the_work() -> None:
    row = Meter(CPU).compare("sleep", lambda: time.sleep(0.02), lambda: time.sleep(0.04), memory=False)
    assert 0.02 <= row.seconds < 0.04 <= row.textbook_seconds  # type: ignore[operator]


def test_memory_is_the_peak_of_what_is_held_at_once() -> None:
    def work() -> None:
        one = torch.ones(1_000_000)
        del one
        both = torch.ones(1_000_000), torch.ones(500_000)
        del both

    assert allocated_peak(work, CPU) == pytest.approx(6_000_000, rel=1e-3)


def test_resident_memory_counts_what_is_touched() -> None:
    def work() -> None:
        with mmap.mmap(-1, 100_000_000) as held:  # fresh pages: an allocator may have some that were touched before
            for page in range(0, len(held), mmap.PAGESIZE):
                held[page] = 1
            time.sleep(0.5)

    peak = resident_peak(work)
    if peak is None:
        pytest.skip("this system has no /proc/self/smaps_rollup")
    assert 90_000_000 < peak < 150_000_000


def test_what_is_wrong_with_the_batch_is_said_first(quick: BenchSettings) -> None:
    with pytest.raises(DataError, match="a batch of 500"):
        run_bench(quick.model_copy(update={"batch": 500}), ["recall", "step"], silent)


def test_the_textbook_images_are_ours(tiny_set: Path) -> None:
    path = next(tiny_set.rglob("*.jpg"))
    image, _ = textbook.Images([path], [0], 36, 36, train=False, as_bytes=True)[0]
    assert torch.equal(image.permute(1, 2, 0), torch.from_numpy(load_resized(path, 36).copy()))


def test_the_command_prints_a_table_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["distance"], ["distance", "--json"], ["nonsense"]):
        with pytest.raises(SystemExit):
            main(["bench", "--quick", "--device", "cpu", *arguments])
    output = capsys.readouterr()
    table, _, rest = output.out.partition("{")
    assert "RKD-D, N=16" in table
    found = json.loads("{" + rest)
    assert [row["work"] for row in found["rows"]] == ["RKD-D, N=16", "RKD-D, N=32"]
    assert found["machine"]["torch"] == torch.__version__
    assert "Measuring RKD-D, N=32: 0 of 1 parts" in output.err.splitlines()
    assert output.err.splitlines()[-1].startswith("rkd: error: PART nonsense: must be one of angle, ")
