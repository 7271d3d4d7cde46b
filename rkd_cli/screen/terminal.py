"""Progress of a run: a live screen on a terminal, plain lines in a log."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from itertools import groupby

from rich import box
from rich.console import Console, ConsoleDimensions, Group, RenderableType
from rich.control import Control
from rich.live import Live
from rich.markdown import Markdown
from rich.measure import Measurement
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from rkd_cli.events import (
    Event,
    Note,
    Progress,
    Reporter,
    RunDone,
    RunStarted,
    StepDone,
    TeacherEvaluated,
)
from rkd_cli.report.text import (
    cell,
    closing_line,
    cost_line,
    duration,
    ended_lines,
    epoch_line,
    figure_columns,
    figures_line,
    header_rows,
    next_line,
    percent,
    saved_line,
    title,
)
from rkd_cli.runtime.doctor import memory_used
from rkd_cli.schemas import OVERLAP, EpochDone, leading

_FEW = 2  # epochs that a table shows at least
_TALL = 16  # terminal lines from which the course of losses and recall is drawn
_WIDE = 110  # terminal columns from which loss terms, learning rate and speed get table columns
_BEST = "← best"
_SILENCE = 20.0  # seconds
_PAGE = 100  # width of a manual page
_BLOCKS = "▁▂▃▄▅▆▇█"  # of a sparkline
_NOTES = 3  # newest ones, drawn again after a resize
_COMMAND = "next: "  # lines to copy: only the terminal may wrap them
console = Console(highlight=False, emoji=False)


@contextmanager
def reporter(quiet: bool, advise: bool = True, name: str = "") -> Iterator[Reporter]:
    """The reporter for terminal or log.

    ``quiet``: print the result only. ``advise``: print the next command. ``name``: start all lines with it, because
    several runs print at once.
    """
    if quiet:
        yield _Quiet(name)
    elif name:
        yield _PlainLines(False, name)
    elif console.is_terminal:
        with LiveScreen(console, advise) as screen:
            yield screen
    else:
        yield _PlainLines(advise)


def progress_lines(event: Event, /) -> None:
    """A Reporter that prints notes and progress to stderr, because the result goes to stdout."""
    match event:
        case Note():
            line = f"note: {event.text}"
        case Progress():
            line = _progress_line(event)
        case _:
            return
    Console(stderr=True, highlight=False, emoji=False).print(line, soft_wrap=True, markup=False)


def _progress_line(event: Progress) -> str:
    if event.unit == "bytes":
        return f"{event.what}: {event.done / 1e6:.0f} of {event.total / 1e6:.0f} MB"
    return f"{event.what}: {event.done:,} of {event.total:,} {event.unit}"


def _closing_lines(run: RunStarted, done: RunDone, advise: bool) -> list[str]:
    following = next_line(run, done)
    said = [following] if advise or not following.startswith(_COMMAND) else []
    return [*ended_lines(run, done), saved_line(done), cost_line(run, done), *said, closing_line(done)]


class _Quiet:
    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, event: Event, /) -> None:
        if isinstance(event, RunDone):
            console.print(f"{self._name}{closing_line(event)}", soft_wrap=True, markup=False)


class _PlainLines:
    """A line per epoch, and one about the work in progress after ``_SILENCE`` seconds without a line."""

    def __init__(self, advise: bool, name: str = "", clock: Callable[[], float] = time.monotonic) -> None:
        self._advise = advise
        self._name = name
        self._clock = clock
        self._run: RunStarted | None = None
        self._last = clock()  # line

    def __call__(self, event: Event, /) -> None:
        if isinstance(event, Progress | StepDone) and self._clock() < self._last + _SILENCE:
            return
        for line in self._lines(event):
            console.print(f"{self._name}{line}", soft_wrap=True, markup=False)
            self._last = self._clock()

    def _lines(self, event: Event) -> Sequence[str]:
        match event:
            case RunStarted():
                self._run = event
                return [title(event), *(f"  {label}: {text}" for label, text in header_rows(event))]
            case Note():
                return [f"note: {event.text}"]
            case Progress():
                return [_progress_line(event)]
            case StepDone():
                assert self._run
                done = f"epoch {event.epoch}/{self._run.epochs}  step {event.step}/{self._run.steps_per_epoch}"
                losses = "  ".join(f"{term} {value:.5g}" for term, value in event.losses.items())
                return [f"{done}  {losses}  {event.images_per_second:.0f} images/s"]
            case TeacherEvaluated():
                return [f"teacher  {figures_line(event.figures)}"]
            case EpochDone():
                assert self._run
                return [epoch_line(event, self._run.epochs)]
            case RunDone():
                assert self._run
                return _closing_lines(self._run, event, self._advise)
            case _:
                return []


class LiveScreen:
    """The run so far, redrawn in place: header, recall table, losses, progress."""

    def __init__(self, console: Console, advise: bool = True, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._advise = advise
        self._clock = clock
        self._since: float | None = None  # the run, or the program, started
        self._size: ConsoleDimensions | None = None  # of the terminal, when it was last drawn
        self._notes: list[Text] = []
        self._above: list[Text] = []  # notes that a resize has erased
        self._reset()
        self._live = Live(console=console, get_renderable=self.render, refresh_per_second=4, transient=True)

    def _reset(self) -> None:
        self._run: RunStarted | None = None
        self._rows: list[EpochDone] = []
        self._teacher: TeacherEvaluated | None = None
        self._step: StepDone | None = None
        self._work: Progress | None = None
        self._before: dict[str, str] = {}  # {work that was done before the run: what it took}
        self._bars: Bars | None = None
        self._training_since: float | None = None

    def __enter__(self) -> LiveScreen:
        self._since = self._clock()
        self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._run and self._rows:  # interrupted: leave the finished epochs on the screen
            self._leave()
        self._live.stop()

    def __call__(self, event: Event, /) -> None:
        match event:
            case RunStarted():
                self._reset()
                self._run, self._since = event, self._clock()
            case Note():
                self._notes = [*self._notes, Text(f"note: {event.text}", "yellow")][-_NOTES:]
                self._console.print(self._notes[-1])
            case Progress():
                self._progress(event)
            case TeacherEvaluated():
                self._teacher, self._work = event, None
            case StepDone():
                if self._training_since is None:
                    self._training_since = self._clock()
                self._step, self._work = event, None
            case EpochDone():
                self._rows.append(event)
                self._work = None
            case RunDone():
                assert self._run
                *lines, last = map(Text, _closing_lines(self._run, event, self._advise))
                last.stylize("bold")
                self._leave(*lines, last)

    def _leave(self, *lines: Text) -> None:
        """Replace the live screen by its final state: printed above it, that would scroll off."""
        parts = self._fitting(2, *lines)  # rich's last line, and the prompt
        self._above = []
        self._reset()
        self._live.refresh()
        for part in parts:
            self._console.print(part)
        for line in lines:
            self._console.print(line, soft_wrap=line.plain.startswith(_COMMAND))

    def _progress(self, event: Progress) -> None:
        self._work = event if event.done < event.total or self._run else None
        if self._run:
            return
        if not self._work:
            self._before[event.what] = f"{event.done:,} {event.unit}" if event.unit != "bytes" else ""
        if not self._bars or self._bars.tasks[0].description != event.what:
            self._bars = _bars(event.unit, self._console)
            self._bars.add_task(event.what, total=event.total)
        self._bars.update(self._bars.tasks[0].id, completed=event.done, total=event.total)

    def render(self) -> RenderableType:
        """The current screen."""
        if self._size not in (None, self._console.size):  # lines have wrapped or moved: rich would erase others
            self._console.control(Control.home(), Control.clear())
            self._above = self._notes
        self._size = self._console.size
        return copy(self)._drawn()  # a snapshot: rich's thread draws while events arrive

    def _drawn(self) -> RenderableType:
        if self._run:
            now = self._now()
            return Group(*self._fitting(0, now), now)
        done = [Text(f"{what}  {took}", "dim") for what, took in self._before.items()][-(self._console.height // 2) :]
        waiting = Text(f"starting ...{self._elapsed('  ')}", "dim")
        return Group(*self._above, *done, self._bars.get_renderable() if self._bars and self._work else waiting)

    def _elapsed(self, before: str = "") -> str:
        return "" if self._since is None else f"{before}{duration(self._clock() - self._since)}"

    def _fitting(self, spare: int, *below: RenderableType) -> list[RenderableType]:
        """Header and table to fit the terminal above ``below``, with ``spare`` empty lines.

        If there is too little room, the header shrinks to a line, then the table loses its rules, then all rows.
        """
        assert self._run
        room = self._console.height - spare - self._lines_of(*below, *self._above)
        what = f"{title(self._run)}: {self._run.network.base}, saving to {self._run.save_dir}"
        line = Text(what, "cyan", no_wrap=True, overflow="ellipsis")
        few = min(_FEW, len(self._rows))
        for header, bare in ((self._header(), False), (line, False), (line, True)):
            left = room - self._lines_of(header, self._table(few, bare)) + few
            if left >= _FEW:
                break
        return [*self._above, header, *([self._table(left, bare)] if left > 0 else [])]

    def _lines_of(self, *parts: RenderableType) -> int:
        return sum(len(self._console.render_lines(part)) for part in parts)

    def _header(self) -> RenderableType:
        assert self._run
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim")
        grid.add_column(overflow="fold")
        for label, text in header_rows(self._run):
            grid.add_row(label, Text(text))  # a path may look like markup
        return Panel(grid, title=title(self._run), title_align="left", box=box.ROUNDED, border_style="cyan")

    def _table(self, room: int, bare: bool) -> Table:
        """The newest epochs, the best one and the first figures, as many as fit. A bare table has no rules."""
        assert self._run
        first = self._rows[0].figures if self._rows else {}
        figures = figure_columns(first, any(split.classes for split in self._run.splits))
        least = figures.index(("eval", leading(first.get("eval", {"R@1": 0})))) + 1 if first else 1
        tables = (self._table_of(figures[:count], room, bare) for count in range(len(figures), least - 1, -1))
        return first_that_fits(tables, self._console, bare)

    def _table_of(self, figures: Sequence[tuple[str, str]], room: int, bare: bool) -> Table:
        terms, wide = list(self._rows[-1].losses) if self._rows else [], self._console.width >= _WIDE
        table = Table(box=None if bare else box.SIMPLE_HEAD, padding=(0, 1), expand=False)
        table.add_column("epoch", justify="right")
        for term in [*terms, "lr", "images/s"] if wide else ["loss"]:
            table.add_column(term, justify="right", style="dim")
        for split, columns in groupby(figures, lambda column: column[0]):
            for first, (_, name) in enumerate(columns):
                short = name.replace("asymmetric", "asym").replace(OVERLAP, "overlap")
                table.add_column(short if first else f"{split} {short}", justify="right")
        best = max((row for row in self._rows if row.is_best), key=lambda row: row.epoch, default=None)
        table.add_column("", min_width=len(_BEST) if best else None)
        blanks = [""] * (len(terms) + 2 if wide else 1)
        if self._teacher:
            cells = [cell(self._teacher.figures, *column) for column in figures]
            table.add_row("teacher", *blanks, *cells, "", style="cyan")
        shown = self._rows[-room:] if room else []
        if room and best and best not in shown:
            shown = [best, *self._rows[-(room - 1) :]] if room > 1 else [best]
        for row in shown:
            losses = [f"{row.losses[term]:.5g}" if term in row.losses else "" for term in terms]
            if wide:
                middle = [*losses, f"{row.learning_rate:.3g}", f"{row.images_per_second:.0f}"] if row.losses else blanks
            else:
                middle = [f"{sum(row.losses.values()):.5g}" if row.losses else ""]
            mark, style = (_BEST, "bold green") if row is best else ("", None)
            cells = [cell(row.figures, *column) for column in figures]
            table.add_row(str(row.epoch), *middle, *cells, mark, style=style)
        return table

    def _now(self) -> RenderableType:
        """Losses, their course and that of the recall, and progress bars of the run and of the current work."""
        assert self._run
        bars = Bars(
            TextColumn("{task.description:<27}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[info]}"),
            console=self._console,
        )
        epoch = self._step.epoch if self._step else 0
        bars.add_task("Epochs", total=self._run.epochs, completed=max(0, len(self._rows) - 1), info=self._left())
        if self._work:
            bars.add_task(self._work.what, total=self._work.total, completed=self._work.done, info=self._work.unit)
        elif self._step:
            info = f"{self._step.images_per_second:.0f} images/s"
            bars.add_task(
                f"Training epoch {epoch}",
                total=self._run.steps_per_epoch,
                completed=self._step.step,
                info=info,
            )
        else:
            bars.add_task("Waiting for the first step" if self._rows else "Starting", total=None, info="")
        losses = Text("", "dim")
        if self._step:
            terms = " ".join(f"{name} {value:.5g}" for name, value in self._step.losses.items())
            losses = Text(f"{terms}  lr {self._step.learning_rate:.3g}", "dim")
        course = [self._course()] if self._console.height >= _TALL else []
        return Group(losses, *course, bars.get_renderable())

    def _course(self) -> Text:
        """Sparklines of the total loss and of the leading figure, and the memory in use."""
        assert self._run
        losses = [sum(row.losses.values()) for row in self._rows if row.losses]
        if self._step and self._step.epoch == len(self._rows):  # an epoch that is not over
            losses.append(sum(self._step.losses.values()))
        found = [figures for row in self._rows if (figures := row.figures.get("val") or row.figures.get("eval"))]
        name = leading(found[0]) if found else ""
        width = min(60, max(8, (self._console.width - 56) // 2))
        parts = [f"loss {sparkline(losses, width)} {losses[-1]:.5g}"] if losses else []
        parts += (
            [f"{name} {sparkline([row[name] for row in found], width)} {percent(found[-1][name])}"] if found else []
        )
        used = [
            f"{what} {size / 1e9:.1f} GB" for what, size in zip(("memory", "GPU"), memory_used(), strict=True) if size
        ]
        return Text("   ".join([*parts, *used]), "dim", no_wrap=True, overflow="ellipsis")

    def _left(self) -> str:
        """Time since the start, and time left: from finished epochs, or in the first one from its steps and the
        evaluation before it."""
        assert self._run
        if not self._rows or not self._step or self._training_since is None:
            return self._elapsed()
        elapsed = self._clock() - self._training_since
        done = len(self._rows) - 1
        if not done:
            done_share = self._step.step / self._run.steps_per_epoch
            epoch_seconds = elapsed / done_share + self._rows[0].seconds
        else:
            epoch_seconds = sum(row.seconds for row in self._rows[1:]) / done
        in_epoch = elapsed - sum(row.seconds for row in self._rows[1:])
        left = epoch_seconds * (self._run.epochs - done) - max(0.0, in_epoch)
        return f"{self._elapsed()}, {duration(max(0.0, left))} left"


def sparkline(values: Sequence[float], width: int) -> str:
    """The last values as blocks, the lowest of them as the smallest; spaces for what is not finite."""
    shown = values[-width:]
    finite = [value for value in shown if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BLOCKS[round((value - low) * scale)] if math.isfinite(value) else " " for value in shown)


def first_that_fits(tables: Iterable[Table], console: Console, on_one_line: bool = False) -> Table:
    """The first table that fits without truncated words, or the last one. Widest tables come first."""
    for table in tables:
        if on_one_line:
            fits = Measurement.get(console, console.options.update(max_width=10**4), table).maximum <= console.width
        else:  # rich underestimates the minimum width
            fits = not any("…" in part.text for line in console.render_lines(table) for part in line)
        if fits:
            break
    return table


def show_pages(pages: Mapping[str, str]) -> None:
    """The pages of the manual, {name: subject}."""
    table = Table.grid(padding=(0, 2))
    for name, about in pages.items():
        table.add_row(Text(f"rkd manual {name}", "bold"), about)
    console.print(table)


def show_page(markdown: str) -> None:
    """A page of the manual: in a pager on a terminal, else as Markdown."""
    if not console.is_terminal:
        console.out(markdown, end="", highlight=False)
        return
    os.environ.setdefault("LESS", "-FRX")  # colors; no pager for what fits the screen
    with console.pager(styles=True):
        console.print(Markdown(markdown), width=min(console.width, _PAGE))


class _Speed(ProgressColumn):
    """The unit and the speed over the last half minute."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        """See ``ProgressColumn``."""
        return Text(f"{self._unit}, {task.speed:,.0f}/s" if task.speed and self._unit == "images" else self._unit)


def _bars(unit: str, console: Console) -> Bars:
    counts = [DownloadColumn(), TransferSpeedColumn()] if unit == "bytes" else [MofNCompleteColumn(), _Speed(unit)]
    return Bars(TextColumn("{task.description}"), BarColumn(), *counts, TimeRemainingColumn(), console=console)
