"""The part that a machine with a GPU measures: it runs at toy sizes, within its time, and counts what it says."""

from __future__ import annotations

import json
import multiprocessing
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from forked import CONTEXT
from rkd_cli.bench import gpu, measure, suite, textbook
from rkd_cli.bench.gpu import run_gpu
from rkd_cli.bench.measure import Measurement, Meter, allocated_peak, free_memory, trace_of, traced
from rkd_cli.bench.suite import relation, relation_of
from rkd_cli.events import Event, Note
from rkd_cli.losses import RKDAngle
from rkd_cli.settings import BenchSettings

CPU = torch.device("cpu")
Rkd = Callable[..., tuple[int, str, str]]


@pytest.fixture
def quick(tmp_path: Path) -> BenchSettings:
    return BenchSettings(quick=True, data=tmp_path, device="cpu")


@pytest.fixture
def _forking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "get_context", lambda method: CONTEXT)


@pytest.mark.slow
@pytest.mark.usefixtures("_forking")
def test_all_of_it_runs_at_toy_sizes(rkd: Rkd, tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    code, table, err = rkd("bench", "gpu", "--quick", "--device", "cpu", "--data", tmp_path, "--out", out, "--quiet")
    assert code == 0, err
    assert "RKD-A, N=16" in table
    rows = {row["work"]: row for row in json.loads(out.read_text())["rows"]}
    assert all(row["seconds"] > 0 for row in rows.values())
    names = ("teacher", "distillation")
    for step in (f"one {name} step, batch of 10, {precision}" for precision in ("fp32", "bf16") for name in names):
        assert rows[step]["faster"] and rows[step]["leaner"]
        assert "% of the step is not the networks' forward and backward, no kernels seen" in rows[step]["note"]
    for name in names:
        for where in ("on the device", "mapped from a file", "streamed, decoded each time"):
            row = rows[f"one {name} epoch's 2 steps, fp32, pixels {where}"]
            assert "of the speed of a fixed batch" in row["note"]
    recipe = rows["CUB recipe, all of it (48 images, 40 + 80 epochs), fp32, extrapolated"]
    assert recipe["note"].startswith("from steps of ")
    for loss in ("RKD-A, N=16", "RKD-D, N=16"):
        assert rows[loss]["faster"] and rows[f"{loss}: compiled against uncompiled"]["faster"]
    assert {"all triplets, N=20", "Recall@1,2,4,8 of 500 x 512", "R-Precision and MAP@R of 1,000 x 128"} < rows.keys()


def test_without_a_gpu_it_is_refused(rkd: Rkd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = rkd("bench", "miners", "gpu", "--device", "cpu", "--quiet")
    assert (code, out) == (2, "")
    assert err == "rkd: error: PART gpu: no CUDA device. Pass --quick to run toy sizes on the CPU.\n"


def test_images_that_are_not_there_are_said_first(rkd: Rkd, tmp_path: Path) -> None:
    given = ("--dataset", "cub200", "--data", tmp_path)
    code, out, err = rkd("bench", "gpu", "--quick", "--device", "cpu", *given, "--quiet")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "CUB_200_2011: no such folder" in err


@pytest.mark.usefixtures("_forking")
def test_a_compiler_that_dies_is_told(quick: BenchSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(RKDAngle):
        def __reduce__(self) -> tuple[object, ...]:
            return sys.exit, (3,)  # in the process that reads it

    monkeypatch.setattr(gpu, "_named", lambda: [("RKD-A", Broken(), textbook.angle_loss)])
    events: list[Event] = []
    assert list(gpu._compiled(quick, events.append, Meter(CPU))) == []
    assert events == [Note("RKD-A, compiled: its process died, more rows are left out")]


def test_pieces_that_there_is_no_time_for_are_named(quick: BenchSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_SECONDS", 0.0)
    events: list[Event] = []
    assert run_gpu(quick, events.append) == []
    notes = [event.text for event in events if isinstance(event, Note)]
    assert [note.split(":")[0] for note in notes] == [
        "steps", "readers", "recipe", "losses", "miners and recall", "a million rows", "compiled losses",
    ]  # fmt: skip
    assert all("left out" in note for note in notes)


def test_a_compiler_that_takes_too_long_is_ended(quick: BenchSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_COMPILING", 0.5)
    events: list[Event] = []
    assert list(gpu._compiled(quick, events.append, Meter(CPU))) == []
    assert events == [Note(f"RKD-{loss}, compiled: 0 s are over, more rows are left out") for loss in "AD"]
    assert not multiprocessing.active_children()


def test_a_loss_that_cannot_be_compiled_is_told(quick: BenchSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(loss: object, **options: object) -> Callable[..., object]:
        def fail(*_: object) -> None:
            raise RuntimeError("no compiler here\nmore")

        return fail

    monkeypatch.setattr(torch, "compile", refuse)
    receiver, sender = multiprocessing.Pipe(duplex=False)
    gpu._compile(sender, "N={}", RKDAngle(), quick, CPU)
    assert receiver.recv() == "N=16: no compiler here"


def test_a_piece_that_fails_costs_no_other(quick: BenchSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Measurement("kept", 1.0)

    def broken(*_: object) -> Iterator[Measurement]:
        yield kept
        raise torch.OutOfMemoryError("CUDA out of memory\nmore")

    for name in ("_steps", "_readers", "_recipe", "_losses", "_miners_and_recall", "_compiled"):
        monkeypatch.setattr(gpu, name, lambda *_: iter(()))
    monkeypatch.setattr(gpu, "_steps", broken)
    events: list[Event] = []
    rows = run_gpu(quick, events.append)
    assert rows[0] is kept and len(rows) == 3  # and those of a million rows
    assert [e for e in events if isinstance(e, Note)] == [Note("steps: failed after 1 rows (CUDA out of memory)")]


def test_a_metric_that_would_take_too_long_is_scaled(quick: BenchSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_MILLION", 0.0)
    rows = list(gpu._million(quick, Meter(CPU)))
    assert [row.work for row in rows] == [
        f"{name} of 100 x 128" for name in ("Recall@1,2,4,8", "R-Precision and MAP@R")
    ]
    assert [row.note for row in rows] == [f"1,000 would take some {100 * row.seconds:.0f} s" for row in rows]


def test_the_trace_of_two_steps_is_counted() -> None:
    def event(cat: str, name: str, start: float, length: float) -> dict[str, Any]:
        return {"ph": "X", "cat": cat, "name": name, "ts": start, "dur": length}

    events = [
        event("user_annotation", measure._STEP, 0, 100),
        event("user_annotation", measure._STEP, 200, 100),
        event("user_annotation", "Optimizer.step#Adam.step", 250, 10),
        event("gpu_user_annotation", measure._STEP, 0, 900),  # the device's side of it: neither work nor a step
        event("cuda_runtime", "cudaLaunchKernel", 1, 1),
        event("cuda_runtime", "cudaStreamSynchronize", 50, 10),
        event("cuda_runtime", "cudaStreamSynchronize", 290, 10),
        event("cuda_runtime", "cudaEventSynchronize", 210, 10),
        event("cuda_runtime", "cudaDeviceSynchronize", 350, 10),  # after the steps
        event("kernel", "one", 10, 40),
        event("kernel", "another, at once on another stream", 20, 10),
        event("kernel", "third", 60, 20),
        event("gpu_memcpy", "Memcpy HtoD", 70, 30),
        event("gpu_memset", "Memset", 400, 20),
        event("gpu_memcpy", "Memcpy DtoD (Device -> Device)", 420, 10),
        {"ph": "M", "name": "process_name"},
    ]
    found = trace_of(events, 2)
    assert (found.kernels, found.copies, found.waits) == (1.5, 0.5, 1.5)
    assert found.busy == pytest.approx(55e-6)
    assert found.told(110e-6) == "2 kernels, 0 copies over the bus, 2 waits, GPU idle 50.0%"
    assert found.told(50e-6).endswith("GPU idle 0.0%")  # the clocks are two


def test_what_the_textbook_takes_is_no_underestimate(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_device, asked = torch.device("cuda"), [0]
    monkeypatch.setattr(suite, "free_memory", lambda device: asked[0])
    for n in (64, 160):
        asked[0] = allocated_peak(relation_of(textbook.angle_loss, n, CPU), CPU) or 0
        assert not suite._textbook_fits(n, gpu_device)
        asked[0] *= 2
        assert suite._textbook_fits(n, gpu_device)
    assert [suite._textbook_fits(n, CPU) for n in (512, 513)] == [True, False]


def test_where_the_textbook_does_not_fit_a_gpu_ours_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def alone(meter: Meter, work: str, ours: Callable[[], object]) -> Measurement:
        return Measurement(work, 5.0)

    monkeypatch.setattr(suite, "free_memory", lambda device: 80_000_000_000)
    monkeypatch.setattr(suite, "relation_of", lambda loss, n, device: lambda: None)
    monkeypatch.setattr(Meter, "once", alone)
    there = Meter(torch.device("cuda"))
    assert relation("RKD-A, N=2048", RKDAngle(), textbook.angle_loss, 2048, there) == Measurement("RKD-A, N=2048", 5.0)
    assert suite._textbook_fits(1024, there.device)


@pytest.mark.cuda
def test_a_gpu_is_measured() -> None:
    device = torch.device("cuda")
    x = torch.ones(1_000_000, device=device)

    def step() -> None:
        (x + 1).sum().item()

    step()
    found = traced(step, device)
    assert found.kernels >= 2 and found.copies >= 1 and found.waits >= 1
    assert 0 < found.busy < 0.1
    assert (Meter(device).once("", lambda: x + 1).bytes or 0) == pytest.approx(4_000_000, rel=0.1)
    assert free_memory(device) > 0
    row = relation("", RKDAngle(), textbook.angle_loss, 64, Meter(device))
    assert row.faster and row.leaner


@pytest.mark.parametrize("there", [False, True])
def test_out_is_what_json_prints(rkd: Rkd, tmp_path: Path, there: bool) -> None:
    out = tmp_path / "bench.json"
    if there:
        out.write_text("old")
    code, table, _ = rkd("bench", "distance", "--quick", "--device", "cpu", "--out", out, "--quiet")
    assert code == 0 and "RKD-D, N=16" in table
    found = json.loads(out.read_text())
    assert found.keys() == {"machine", "rows"}
    assert [row["work"] for row in found["rows"]] == ["RKD-D, N=16", "RKD-D, N=32"]
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]


@pytest.mark.parametrize(
    ("name", "why"),
    [("no/such/a.json", "cannot be written (No such file or directory)"), ("", "is a folder. Name a file")],
)
def test_an_out_that_cannot_be_is_refused_before_anything_is_measured(
    rkd: Rkd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, why: str
) -> None:
    monkeypatch.setattr(suite, "PARTS", {"distance": pytest.fail})
    code, out, err = rkd("bench", "distance", "--quick", "--device", "cpu", "--out", tmp_path / name)
    assert (code, out) == (2, "")
    assert err.startswith(f"rkd: error: --out {tmp_path / name}: {why}")
    assert err.count("\n") == 1
