"""What is shown: the live screen at two widths, the plain lines of a log, and the tables."""

from __future__ import annotations

import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from rkd_cli.commands.demo import DemoResult, DemoRow
from rkd_cli.commands.evaluate import Evaluation, SplitMetrics
from rkd_cli.commands.variants import Variant
from rkd_cli.events import (
    Event,
    NetworkFacts,
    Note,
    ObjectiveFacts,
    Progress,
    RunDone,
    RunStarted,
    SplitFacts,
    StepDone,
    TeacherEvaluated,
)
from rkd_cli.report.text import closing_line, next_line
from rkd_cli.runtime.doctor import memory_used, peak_memory
from rkd_cli.schemas import EpochDone, Header, Result
from rkd_cli.screen import tables, terminal
from rkd_cli.screen.tables import show_demo, show_evaluations, show_text
from rkd_cli.screen.terminal import LiveScreen, _PlainLines, reporter, sparkline

STARTED = RunStarted(
    command="distill",
    dataset="birds",
    splits=(SplitFacts("train", 1200, 60), SplitFacts("eval", 1180, 59), SplitFacts("val", 300, 15)),
    network=NetworkFacts("resnet18", 11_210_000, 64, l2normalize=False),
    teacher=NetworkFacts("resnet50", 24_560_000, 512, l2normalize=True, path=Path("t/best.safetensors")),
    objectives=(ObjectiveFacts({"fitnet": 1.0}, epochs=4), ObjectiveFacts({"dist": 1.0, "angle": 2.0})),
    sample=None,
    device="CPU, 2 threads",
    precision="fp32",
    reader="decoded in every epoch by 2 workers",
    save_dir=Path("student"),
    epochs=30,
    steps_per_epoch=10,
    resumed_at=(3, 7),
)


def epoch(number: int, eval_recall: float, best: bool = False) -> EpochDone:
    recalls = {f"R@{k}": min(1.0, eval_recall * k**0.5) for k in (1, 2, 4, 8)}
    losses = {"distance": 0.0123456, "angle": 1.5} if number else {}
    return EpochDone(
        epoch=number, losses=losses, learning_rate=1e-4 if number else 0.0, seconds=8.0, images_per_second=123.4,
        figures={"train": {"R@1": 0.75}, "eval": recalls}, is_best=best,
    )  # fmt: skip


SAVED = (Path("s/best.safetensors"), Path("s/last.safetensors"))
RESULT = Result(
    selected_on="eval", best_epoch=3, best={"eval": {"R@1": 0.57634}}, final={"eval": {"R@1": 0.5}},
    best_train={"R@1": 0.794}, seconds=61.0,
)  # fmt: skip
DONE = RunDone(RESULT, SAVED, model_bytes=45_678_900, milliseconds=4.1289)
UNTRAINED = replace(DONE, result=RESULT.model_copy(update={"best_epoch": 0}))
STORY: list[Event] = [
    STARTED,
    TeacherEvaluated({"train": {"R@1": 0.8}, "eval": {"R@1": 0.61, "R@2": 0.7, "R@4": 0.8, "R@8": 0.9}}),
    epoch(0, 0.1, best=True),
    StepDone(1, 5, {"distance": 0.5, "angle": 0.25}, 1e-4, 99.0),
    epoch(1, 0.2, best=True),
    Note("look here"),
    epoch(2, 0.15),
]


@pytest.fixture
def console(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Console:
    width = getattr(request, "param", 100)
    made = Console(file=io.StringIO(), width=width, height=30, force_terminal=False, highlight=False)
    for module in (terminal, tables):
        monkeypatch.setattr(module, "console", made)
    return made


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_log_gets_one_line_an_epoch(console: Console) -> None:
    with reporter(quiet=False) as report:
        for event in [*STORY, DONE]:
            report(event)
    assert printed(console).splitlines() == [
        "Distilling",
        "  data: birds: 1,200 images of 60 classes train, 1,180 images of 59 classes evaluate, "
        "300 images of 15 classes pick the best epoch",
        "  student: resnet18, 11.2 M parameters, 64-d, not normalized",
        "  teacher: resnet50, 24.6 M parameters, 512-d, unit length, t/best.safetensors",
        "  loss: 4 epochs 1 fitnet, then 1 dist + 2 angle",
        "  device: CPU, 2 threads, fp32, images decoded in every epoch by 2 workers",
        "  saving to: student",
        "  resuming: at epoch 3, after step 7 of it",
        "teacher  train R@1 80.00  eval R@1 61.00 R@2 70.00 R@4 80.00 R@8 90.00",
        "epoch 0/30  train R@1 75.00  eval R@1 10.00 R@2 14.14 R@4 20.00 R@8 28.28  8 s  best",
        "epoch 1/30  distance 0.012346  angle 1.5  lr 0.0001  123 images/s  train R@1 75.00  "
        "eval R@1 20.00 R@2 28.28 R@4 40.00 R@8 56.57  8 s  best",
        "note: look here",
        "epoch 2/30  distance 0.012346  angle 1.5  lr 0.0001  123 images/s  train R@1 75.00  "
        "eval R@1 15.00 R@2 21.21 R@4 30.00 R@8 42.43  8 s",
        "saved s/best.safetensors (epoch 3) and last.safetensors in 1:01",
        "s/best.safetensors: 45.7 MB, 11.2 M parameters, 4.13 ms an image (one thread)",
        "next: rkd evaluate s",
        "Best Train Recall: 0.7940, Best Eval Recall: 0.5763",
    ]


def test_a_log_is_never_silent_for_long(console: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "_SILENCE", 20.0)
    now = iter(range(10**6))  # a second passes with each look at the clock
    report = _PlainLines(advise=True, clock=lambda: float(next(now)))
    for done in range(201):
        report(Progress("Downloading", done * 10**6, 2 * 10**8, "bytes"))
    report(replace(STARTED, resumed_at=None))
    for step in range(1, 41):
        report(StepDone(2, step, {"distance": 0.5}, 1e-4, 99.0))
    lines = printed(console).splitlines()
    assert lines[0] == "Downloading: 19 of 200 MB"
    assert sum("Downloading" in line for line in lines) == 10
    assert lines[-1].startswith("epoch 2/30  step ") and "images/s" in lines[-1]
    assert sum("step" in line for line in lines) == 2  # forty steps in as many seconds


def test_the_next_command_is_that_of_what_was_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where no student is
    shared = {"dataset": "folder", "data": Path("my photos"), "image_size": 64, "skip_damaged": True}
    teacher = replace(STARTED, command="train-teacher", teacher=None, shared=shared)
    command = "next: rkd distill --teacher s --dataset folder --data 'my photos' --image-size 64 --skip-damaged"
    assert next_line(teacher, DONE) == command
    assert next_line(replace(teacher, shared={}), DONE) == "next: rkd distill --teacher s"
    for number in ("", "-2"):
        (tmp_path / f"student{number}").mkdir()
        (tmp_path / f"student{number}/settings.json").touch()
    assert next_line(teacher, DONE) == f"{command} --save-dir student-3"
    assert next_line(replace(STARTED, shared=shared), DONE) == "next: rkd evaluate s --skip-damaged"
    of_photos = RunDone(RESULT.model_copy(update={"best": {"eval": {"overlap@10": 0.5}}}), SAVED)
    assert next_line(STARTED, of_photos) == "next: rkd embed s --out embeddings.npz"
    assert next_line(replace(STARTED, shared={"data": Path("p")}), of_photos) == (
        "next: rkd embed s --data p --out embeddings.npz"
    )
    assert next_line(teacher, UNTRAINED).startswith("note: the best epoch is 0, the network before")


def test_names_between_colons_are_no_emojis(capsys: pytest.CaptureFixture[str]) -> None:
    show_text(":fire:.npz")
    with reporter(quiet=False) as report:
        report(Note("data/:100:"))
    assert capsys.readouterr().out == ":fire:.npz\nnote: data/:100:\n"


def test_of_several_runs_none_says_what_is_next(console: Console) -> None:
    with reporter(quiet=False, advise=False) as report:
        for event in [*STORY, DONE, STARTED, UNTRAINED]:
            report(event)
    lines = printed(console).splitlines()
    assert not [line for line in lines if line.startswith("next:")]
    assert lines[-2].startswith("note: the best epoch is 0")
    assert lines.count(closing_line(DONE)) == 2


def test_quiet_prints_the_result_alone(console: Console) -> None:
    with reporter(quiet=True) as report:
        for event in [*STORY, DONE]:
            report(event)
    assert printed(console) == closing_line(DONE) + "\n"


def screen(width: int, height: int, events: list[Event], seconds: float = 100.0) -> list[str]:
    """The live screen after some events, as lines of text."""
    console = Console(file=io.StringIO(), width=width, height=height, force_terminal=True, color_system=None)
    clock = iter([0.0] * 2 + [seconds] * 100)
    live = LiveScreen(console, clock=lambda: next(clock))
    for event in events:
        live(event)
    with console.capture() as capture:
        console.print(live.render())
    return capture.get().splitlines()


def text_of(live: LiveScreen) -> str:
    with live._console.capture() as capture:
        live._console.print(live.render())
    return capture.get()


@pytest.mark.parametrize("width", [80, 140])
def test_the_screen_shows_header_table_losses_and_progress(width: int) -> None:
    events: list[Event] = [*STORY, StepDone(3, 4, {"distance": 0.1, "angle": 0.05}, 1e-4, 250.0)]
    lines = screen(width, 40, events, seconds=20.0)
    text = "\n".join(lines)
    assert all(len(line) <= width for line in lines)
    assert "Distilling" in lines[0]
    assert any(line.split()[:3] == ["│", "data", "birds:"] for line in lines)
    rows = {line.split()[0]: line for line in lines if line.strip() and line.split()[0] in ("teacher", "0", "1", "2")}
    assert set(rows) == {"teacher", "0", "1", "2"}
    assert "← best" in rows["1"]
    assert "← best" not in rows["0"] + rows["2"]
    assert "20.00" in rows["1"]
    assert "distance 0.1 angle 0.05" in text
    assert "4/10" in text
    assert "250 images/s" in text
    assert "left" in text
    assert ("images/s" in next(line for line in lines if line.split()[:1] == ["epoch"])) == (width == 140)
    assert ("0.012346" in rows["1"]) == (width == 140)
    assert ("1.5123" in rows["1"]) == (width == 80)


def test_a_long_run_fits_the_screen_and_keeps_its_best_row() -> None:
    events: list[Event] = [STARTED, epoch(0, 0.1, best=True), epoch(1, 0.9, best=True)]
    events += [epoch(number, 0.2) for number in range(2, 30)]
    events.append(StepDone(30, 4, {"distance": 0.1, "angle": 0.05}, 1e-4, 250.0))
    lines = screen(100, 24, events)
    assert len(lines) <= 24
    shown = [line.split()[0] for line in lines if line.strip() and line.split()[0].isdigit()]
    assert shown[0] == "1"
    assert shown[-1] == "29"
    assert len(shown) >= 5


def seen(text: str, height: int) -> list[str]:
    """What a terminal shows after what rich has written to it."""
    rows, at, column = [""], 0, 0
    for token in re.findall(r"\x1b\[\??\d*[A-Za-z]|[\r\n]|[^\x1b\r\n]+", text):
        if token == "\n":
            at, column = at + 1, 0
            rows += [""] * (at == len(rows))
        elif token == "\r":
            column = 0
        elif token.endswith("A"):
            at = max(len(rows) - height, at - int(token[2:-1]), 0)
        elif token.endswith("K"):
            rows[at] = ""
        elif token.endswith("H"):
            at, column = max(0, len(rows) - height), 0
        elif token.endswith("J"):
            rows = [*rows[: max(0, len(rows) - height)], *[""] * min(len(rows), height)]
        elif not token.startswith("\x1b"):
            rows[at] = rows[at][:column].ljust(column) + token + rows[at][column + len(token) :]
            column += len(token)
    return rows[-height:]


@pytest.mark.parametrize(("width", "height"), [(60, 20), (80, 12), (80, 24), (140, 45)])
@pytest.mark.parametrize("interrupted", [False, True])
def test_a_run_that_is_over_stays_on_the_screen(width: int, height: int, interrupted: bool) -> None:
    file = io.StringIO()
    console = Console(
        file=file, width=width, height=height, force_terminal=True, color_system=None, legacy_windows=False
    )
    with LiveScreen(console) as live:
        live(replace(STARTED, splits=STARTED.splits[:2]))
        live(STORY[1])
        live(epoch(0, 0.1, best=True))
        for number in range(1, 30):
            live(epoch(number, 0.2, best=number == 3))
            live._live.refresh()
        if not interrupted:
            live(replace(DONE, saved=(Path("runs/a student") / "best.safetensors", Path("last.safetensors"))))
    lines = [line.rstrip() for line in seen(file.getvalue(), height)]
    assert "Distilling" in lines[0]
    assert "starting" not in "".join(lines)
    assert any("← best" in line for line in lines)
    known = ["75.00", "20.00", "28.28", *(["40.00", "56.57"] if width > 60 else [])]
    best = next(line.split() for line in lines if line.split()[:1] == ["3"])
    assert best[2 if width < 140 else 5 :] == [*known, "←", "best"]
    assert "61.00" in next(line for line in lines if line.split()[:1] == ["teacher"])
    if interrupted:
        return
    assert [line for line in lines if line][-1] == closing_line(DONE)
    assert width > 60 or "4.13 ms an image (one thread)" in lines  # no word is broken
    assert " ".join(" ".join(lines).split()).count("45.7 MB, 11.2 M parameters, 4.13 ms an image (one thread)") == 1
    assert "next: rkd evaluate 'runs/a student'" in lines


def test_a_table_that_fits_only_without_its_last_figures_has_whole_titles() -> None:
    figures: list[Event] = [epoch(0, 0.1, best=True), StepDone(1, 5, {"distance": 0.5, "angle": 0.25}, 1e-4, 99.0)]
    for width in range(48, 112):
        lines = screen(width, 20, [STARTED, *figures])
        first = next(at for at, line in enumerate(lines) if line.split()[:1] == ["epoch"])
        assert not [line for line in lines[first - 1 : first + 3] if "…" in line], width
        assert "10.00" in lines[first + 2]


@pytest.mark.parametrize(("width", "height"), [(60, 20), (80, 12), (80, 24), (140, 45), (40, 9)])
def test_any_terminal_shows_what_matters_most(width: int, height: int) -> None:
    events: list[Event] = [STARTED, STORY[1], *(epoch(number, 0.2, best=number == 3) for number in range(30))]
    lines = screen(width, height, [*events, StepDone(30, 4, {"distance": 0.1, "angle": 0.05}, 1e-4, 250.0)])
    assert len(lines) <= height
    assert all(len(line) <= width for line in lines)
    assert any(line.startswith("Training epoch 30") for line in lines)
    assert "Distilling" in lines[0]
    if height < 12:
        return
    shown = {line.split()[0]: line.split() for line in lines if line.split()[:1] in (["3"], ["29"], ["teacher"])}
    known = ["75.00", "20.00", "28.28", *(["40.00", "56.57"] if width > 60 else [])]
    assert shown["3"][-len(known) - 2 :] == [*known, "←", "best"]
    assert shown["29"][-len(known) :] == known
    assert "61.00" in shown["teacher"]


def test_time_left_counts_epochs_still_to_come() -> None:
    step = StepDone(3, 4, {"distance": 0.1, "angle": 0.05}, 1e-4, 250.0)
    lines = screen(100, 40, [*STORY, step], seconds=20.0)  # 28 epochs of 8 s are left, 4 s of the first are gone
    assert "3:40 left" in next(line for line in lines if line.startswith("Epochs"))


def test_a_sparkline_is_scaled_to_what_it_shows() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 60) == "▁▂▃▄▅▆▇█"
    assert sparkline([100, 3, 1, 2], 3) == "█▁▅"  # 100 is not shown
    assert sparkline([2, 2], 9) == "▁▁"
    assert sparkline([math.nan, 1, 2], 9) == " ▁█"
    assert sparkline([], 9) == ""


def test_the_course_of_a_run_its_memory_and_its_time_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "memory_used", lambda: (1_260_000_000, 3_440_000_000))
    step = StepDone(3, 4, {"distance": 0.1, "angle": 0.05}, 1e-4, 250.0)
    lines = screen(100, 40, [*STORY, step], seconds=75.0)
    course = next(line for line in lines if line.startswith("loss"))
    assert course.split("   ") == ["loss ██▁ 0.15", "R@1 ▁█▄ 15.00", "memory 1.3 GB", "GPU 3.4 GB"]
    assert "1:15, " in next(line for line in lines if line.startswith("Epochs"))
    assert not any(line.startswith("loss") for line in screen(100, 15, [*STORY, step]))
    used, on_gpu = memory_used()
    peak = peak_memory()
    assert used and peak and peak / 10 < used <= peak and on_gpu is None


def test_what_is_computed_before_the_first_step_is_named() -> None:
    decoded, teacher = Progress("Decoding images", 500, 500), Progress("Computing the teacher's views", 3, 9)
    lines = screen(100, 40, [decoded, teacher])
    assert lines[0] == "Decoding images  500 images"
    assert lines[1].startswith("Computing the teacher's views") and "3/9" in lines[1]
    waiting = screen(100, 40, [STARTED, epoch(0, 0.1, best=True)])
    assert any(line.startswith("Waiting for the first step") for line in waiting)
    lines = screen(100, 40, [STARTED, Progress("Evaluating eval images", 250, 250)])  # its recall takes time too
    assert any(line.startswith("Evaluating eval images") for line in lines)


def test_a_resize_leaves_no_torn_panel_and_no_note_is_lost() -> None:
    file = io.StringIO()
    console = Console(file=file, width=140, height=30, force_terminal=True, color_system=None, legacy_windows=False)
    with LiveScreen(console) as live:
        for event in STORY:
            live(event)
        live._live.refresh()
        file.write("debris of lines that wrapped\n" * 3)  # as the terminal shows them
        console.size = (80, 24)
        live._live.refresh()
        live._live.refresh()
        lines = [line.rstrip() for line in seen(file.getvalue(), 24)]
        assert lines[0] == "note: look here"
        assert sum("Distilling" in line for line in lines) == 1
        assert "debris" not in "".join(lines)
        assert all(len(line) <= 80 for line in lines)
    lines = [line.rstrip() for line in seen(file.getvalue(), 24)]
    assert lines.count("note: look here") == 1 and any("← best" in line for line in lines)


def test_a_download_shows_size_and_speed() -> None:
    lines = screen(100, 40, [Progress("Downloading", 5 * 10**8, 10**9, "bytes")])
    assert "Downloading" in lines[0]
    assert "0.5/1.0 GB" in lines[0]


def test_what_was_reached_stays_when_a_run_is_interrupted() -> None:
    console = Console(file=io.StringIO(), width=100, height=40, force_terminal=True, color_system=None)
    with pytest.raises(KeyboardInterrupt), LiveScreen(console) as live:
        for event in STORY:
            live(event)
        raise KeyboardInterrupt
    text = printed(console)
    last = text[text.rindex("Distilling") :]
    assert "← best" in last
    assert "\x1b[?25h" in last  # the cursor is back


def test_a_run_that_ends_while_it_is_drawn_is_drawn_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    live = LiveScreen(Console(file=io.StringIO(), width=100, height=40))
    for event in STORY:
        live(event)

    def end(run: RunStarted) -> list[tuple[str, str]]:
        live._reset()  # as RunDone does, in the other thread
        return []

    monkeypatch.setattr(terminal, "header_rows", end)
    live.render()
    assert "starting" in text_of(live)


PHOTOS = replace(STARTED, splits=(SplitFacts("train", 1200, 0), SplitFacts("eval", 130, 0)), resumed_at=None)
OF_PHOTOS: list[Event] = [
    PHOTOS,
    EpochDone(
        epoch=0, seconds=8.0, is_best=True,
        figures={"train": {"overlap@10": 0.125},
                 "eval": {"overlap@10": 0.25, "asymmetric@1": 0.5, "asymmetric@10": 0.75}},
    ),
    EpochDone(
        epoch=1, losses={"dist": 0.5}, learning_rate=1e-4, seconds=8.0, images_per_second=99.0, is_best=False,
        figures={"train": {"overlap@10": 0.5}, "val": {"overlap@10": 0.375},
                 "eval": {"overlap@10": 0.125, "asymmetric@1": 0.5, "asymmetric@10": 0.75}},
    ),
]  # fmt: skip
OF_PHOTOS_RESULT = Result(
    selected_on="eval", best_epoch=0, best={"eval": {"overlap@10": 0.25}}, final={"eval": {"overlap@10": 0.25}},
    best_train={"overlap@10": 0.5}, seconds=9.0,
)  # fmt: skip
OF_PHOTOS_DONE = RunDone(OF_PHOTOS_RESULT, (Path("a"), Path("b")))


def test_a_log_of_photos_tells_of_agreement(console: Console) -> None:
    with reporter(quiet=False) as report:
        for event in [*OF_PHOTOS, OF_PHOTOS_DONE]:
            report(event)
    lines = printed(console).splitlines()
    assert lines[1] == "  data: birds: 1,200 photos train, 130 photos evaluate"
    assert lines[-6:] == [
        "epoch 0/30  train overlap@10 12.50  eval overlap@10 25.00 asymmetric@1 50.00 asymmetric@10 75.00  8 s  best",
        "epoch 1/30  dist 0.5  lr 0.0001  99 images/s  train overlap@10 50.00  val overlap@10 37.50  "
        "eval overlap@10 12.50 asymmetric@1 50.00 asymmetric@10 75.00  8 s",
        "saved a (epoch 0) and b in 0:09",
        "a: 0.0 MB, 11.2 M parameters",
        "note: the best epoch is 0, the network before training. Train longer, or with another --lr.",
        "Best Train Overlap@10: 0.5000, Best Eval Overlap@10: 0.2500",
    ]
    assert (
        closing_line(RunDone(OF_PHOTOS_RESULT.model_copy(update={"best_train": {}}))) == "Best Eval Overlap@10: 0.2500"
    )


@pytest.mark.parametrize("width", [80, 140])
@pytest.mark.parametrize("held_out", [False, True])
def test_the_screen_of_photos_fits(width: int, held_out: bool) -> None:
    first, second = (event for event in OF_PHOTOS if isinstance(event, EpochDone))
    if held_out:
        first = first.model_copy(update={"figures": {"val": {"overlap@10": 0.375}, **first.figures}})
    events: list[Event] = [PHOTOS, first, *(second.model_copy(update={"epoch": number}) for number in range(1, 30))]
    lines = screen(width, 24, [*events, StepDone(30, 4, {"dist": 0.1}, 1e-4, 250.0)])
    assert len(lines) <= 24
    assert all(len(line) <= width for line in lines)
    best = next(line for line in lines if "← best" in line)
    middle = ["37.50"] if held_out else []
    assert best.split() == ["0", "12.50", *middle, "25.00", "50.00", "75.00", "←", "best"]
    assert lines[-1].startswith("Training epoch 30") and "29" in [line.split()[0] for line in lines if line.strip()]
    empty = screen(width, 24, [PHOTOS])
    assert any("overlap" in line for line in empty) and not any("R@1" in line for line in empty)


RECALLS = {1: 0.5, 2: 0.625, 4: 0.75, 8: 1.0}


def test_an_evaluation_as_table_and_as_json(console: Console) -> None:
    header = Header(
        base="resnet18", embedding_size=8, l2normalize=False, resize=72, image_size=64, mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0), dataset="demo", epoch=3, train_recall={}, eval_recall={},
    )  # fmt: skip
    train = SplitMetrics(RECALLS, 0.4, 0.3, 640, 0)
    evaluation = SplitMetrics({k: v / 2 for k, v in RECALLS.items()}, 0.2, 0.1, 640, 3)
    result = Evaluation(
        "s/best.safetensors", header, 8, False, "cub200", 11_200_000, 44_800_000, 9.25, 2, train, evaluation
    )
    show_evaluations([result], as_json=False)
    text = printed(console)
    assert (
        "s/best.safetensors: resnet18, 11.2 M parameters, 44.8 MB, 9.25 ms an image on the CPU (2 threads), 8-d, "
        "not normalized, epoch 3, on cub200"
    ) in text
    assert "s/best.safetensors: 3 of 640 eval queries have no positive and are left out" in text
    assert [line.split() for line in text.splitlines() if line.strip().startswith(("train", "eval"))] == [
        ["train", "50.00", "62.50", "75.00", "100.00", "40.00", "30.00"],
        ["eval", "25.00", "31.25", "37.50", "50.00", "20.00", "10.00"],
    ]
    show_evaluations([result, result], as_json=False)
    rows = [line.split()[:3] for line in printed(console).splitlines()]
    assert rows.count(["s/best.safetensors", "train", "50.00"]) == 2
    show_evaluations([result], as_json=True)
    found = json.loads(printed(console).splitlines()[-1])
    assert found["eval_recall"] == {"1": 0.25, "2": 0.3125, "4": 0.375, "8": 0.5}
    assert (found["file_bytes"], found["milliseconds"], found["threads"]) == (44_800_000, 9.25, 2)
    assert (found["dataset"], found["eval_map_at_r"], found["eval_without_positive"]) == ("cub200", 0.1, 3)


@pytest.mark.parametrize("console", [80, 140], indirect=True)
@pytest.mark.parametrize("gallery", [None, "teacher/best.safetensors"])
def test_smaller_vectors_and_another_gallery_fit(console: Console, gallery: str | None) -> None:
    split = SplitMetrics(dict.fromkeys(RECALLS, 1.0), 1.0, 1.0, 640, 0)
    variants = [Variant(g, 2048, "binary+rescore", 256, RECALLS) for g in {None, gallery}]
    result = Evaluation("v.npz", None, 2048, True, "sop", 0, None, None, 1, None, split, variants=tuple(variants))
    show_evaluations([result], as_json=False)
    text = printed(console)
    assert text.splitlines()[0] == "v.npz: 2048-d, unit length, on sop"
    assert all(len(line.rstrip()) <= console.width for line in text.splitlines())
    rows = [line.split() for line in text.splitlines()]
    small = ["2048", "binary+rescore", "256", "eval", "50.00", "62.50", "75.00", "100.00"]
    if gallery is None:
        assert small in rows
    else:
        assert ["own", *small] in rows and ["other", *small] in rows
        assert "other: queries in the gallery of teacher/best.safetensors" in text
    assert "train" not in text
    assert ("R-Prec" in text) == (console.width == 140)
    show_evaluations([result], as_json=True)
    found = json.loads(printed(console).splitlines()[-1])
    assert (found["base"], found["parameters"], found["train_recall"]) == (None, None, None)
    assert {v["gallery"] for v in found["variants"]} == {None, gallery}
    assert found["variants"][0]["eval_recall"] == {"1": 0.5, "2": 0.625, "4": 0.75, "8": 1.0}


@pytest.mark.parametrize("console", [60, 80, 140], indirect=True)
def test_the_demo_table_fits(console: Console) -> None:
    rows = [
        DemoRow(name, 1_269_000, 16, unit, {k: v * f for k, v in RECALLS.items()}, RECALLS if f == 0.8 else {})
        for name, unit, f in (
            ("teacher", True, 0.9), ("triplet student", True, 0.5), ("triplet student", False, 0.4),
            ("RKD student", True, 0.625), ("RKD student", False, 0.45), ("D3still student", True, 0.8),
        )
    ]  # fmt: skip
    show_demo(DemoResult(tuple(rows), 240.0, Path("demo")))
    lines = printed(console).splitlines()
    words = [line.split() for line in lines if line.strip()]
    count = 4 if console.width > 60 else 2
    text = " ".join(word for line in words for word in line)
    figures = [["31.25", "39.06", "46.88", "62.50"], ["50.00", "62.50", "75.00", "100.00"]]
    assert ["RKD", "student", "1.27M", "16", "yes", *figures[0][:count]] in words
    assert any(line[-count:] == figures[1][:count] for line in words if "teacher's" in line)
    assert "+6.25 points of Recall@1 with embeddings of unit length, +2.50 without" in text
    assert "This is one seed, in 4.0 minutes" in text
    assert text.endswith("next: rkd evaluate demo/student --gallery demo/teacher")
    assert all(len(line.rstrip()) <= console.width for line in lines[:-4])
