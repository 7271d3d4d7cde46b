"""Log files of progress events, for other programs. Each format is a class."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TextIO

from rkd_cli.errors import SettingsError
from rkd_cli.events import Event, Reporter, Retrieved, RunStarted, StepDone
from rkd_cli.runtime.files import write_text
from rkd_cli.schemas import EpochDone

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


@contextmanager
def logged(report: Reporter, kinds: Sequence[Literal["csv", "tensorboard"]], settings: str) -> Iterator[Reporter]:
    """A reporter that passes events to ``report`` and to loggers, which write into the run's directory.

    ``settings`` are those of the run, as JSON.

    Raises:
        SettingsError: a logger's library is not installed.
    """
    if "tensorboard" in kinds and find_spec("tensorboard") is None:
        raise SettingsError("--log tensorboard: not installed. Run `pip install 'rkd-cli[tensorboard]'`.")
    with ExitStack() as open_files:
        loggers = [
            CsvLogger(open_files) if kind == "csv" else TensorBoardLogger(open_files, settings) for kind in kinds
        ]

        def tell(event: Event) -> None:
            report(event)
            for logger in loggers:
                logger(event)

        yield tell


class CsvLogger:
    """``steps.csv``: a row whenever losses are read, several per second."""

    def __init__(self, open_files: ExitStack) -> None:
        self._open_files = open_files
        self._file: TextIO
        self._terms: list[str] = []

    def __call__(self, event: Event, /) -> None:
        if isinstance(event, RunStarted):
            self._begin(event.save_dir / "steps.csv", event.resumed_at)
        elif isinstance(event, StepDone):
            if not self._terms:
                self._terms = list(event.losses)
                self._write(["epoch", "step", *self._terms, "learning_rate", "images_per_second"])
            losses = [event.losses.get(term, "") for term in self._terms]  # FitNet's hint epochs have others
            self._write([event.epoch, event.step, *losses, event.learning_rate, round(event.images_per_second, 1)])

    def _begin(self, path: Path, resumed_at: tuple[int, int] | None) -> None:
        rows = list(csv.reader(path.read_text().splitlines())) if resumed_at and path.is_file() else []
        self._terms = rows[0][2:-2] if rows else []
        # drop rows after the resume state, which are computed again, and a row that a kill truncated
        valid = [
            row for row in rows[1:] if len(row) == len(rows[0]) and (int(row[0]), int(row[1])) <= (resumed_at or ())
        ]
        write_text(path, "".join(",".join(row) + "\n" for row in [*rows[:1], *valid]))
        self._file = self._open_files.enter_context(path.open("a", newline=""))

    def _write(self, row: Sequence[object]) -> None:
        csv.writer(self._file, lineterminator="\n").writerow(row)
        self._file.flush()


class TensorBoardLogger:
    """``tensorboard/``: scalars per step, a picture of retrieval per epoch, and the settings."""

    def __init__(self, open_files: ExitStack, settings: str) -> None:
        self._open_files, self._settings = open_files, settings
        self._writer: SummaryWriter
        self._steps = 0  # per epoch

    def __call__(self, event: Event, /) -> None:
        if isinstance(event, RunStarted):
            from torch.utils.tensorboard import SummaryWriter

            self._steps = event.steps_per_epoch
            epoch, done = event.resumed_at or (1, 0)
            # hides the points after the resume state
            self._writer = SummaryWriter(event.save_dir / "tensorboard", purge_step=self._at(epoch, done) + 1)
            self._open_files.callback(self._writer.close)
            settings = self._settings.replace('"dataset": "auto"', f'"dataset": "{event.dataset}"')
            self._writer.add_text("settings", "\n".join(f"    {line}" for line in settings.splitlines()))
        elif isinstance(event, StepDone):
            for term, value in event.losses.items():
                self._scalar(f"loss/{term}", value, self._at(event.epoch, event.step))
            self._scalar("learning_rate", event.learning_rate, self._at(event.epoch, event.step))
            self._scalar("images_per_second", event.images_per_second, self._at(event.epoch, event.step))
        elif isinstance(event, Retrieved):
            step = self._at(event.epoch, self._steps)
            self._writer.add_image("retrieval", event.picture(), step, dataformats="HWC")
        elif isinstance(event, EpochDone):
            for split, found in event.figures.items():
                for name, value in found.items():
                    self._scalar(f"{split}/{name}", value, self._at(event.epoch, self._steps))
            self._writer.flush()

    def _scalar(self, name: str, value: float, step: int) -> None:
        self._writer.add_scalar(name, value, step)

    def _at(self, epoch: int, step: int) -> int:
        return max(0, (epoch - 1) * self._steps + step)
