"""Log files of progress events, for other programs. Each format is a class."""

from __future__ import annotations

import csv
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO
from uuid import uuid4

from rkd_cli.errors import RunError, SettingsError, first_line
from rkd_cli.events import Event, Reporter, Retrieved, RunStarted, StepDone
from rkd_cli.runtime.files import write_text
from rkd_cli.schemas import EpochDone

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def logged(report: Reporter, kinds: Sequence[str], settings: str) -> Iterator[Reporter]:
    """A reporter that passes events to ``report`` and to loggers: csv, tensorboard, wandb and mlflow.

    ``settings`` are those of the run, as JSON.

    Raises:
        SettingsError: a logger's library is not installed.
    """
    for kind in kinds:
        if kind != "csv" and find_spec(kind) is None:
            raise SettingsError(f"--log {kind}: not installed. Run `pip install 'rkd-cli[{kind}]'`.")
    with ExitStack() as open_files:
        loggers = [CsvLogger(open_files) if kind == "csv" else _Curves(open_files, settings, kind) for kind in kinds]

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


class _Curves:
    """Losses per step, figures and a picture of retrieval per epoch, and the settings, for another program to draw."""

    def __init__(self, open_files: ExitStack, settings: str, kind: str) -> None:
        self._open_files, self._settings, self._kind = open_files, settings, kind
        self._target: _TensorBoard | _Wandb | _Mlflow
        self._steps = 0  # per epoch
        self._logged = 0  # epochs before this one are in the log

    def __call__(self, event: Event, /) -> None:
        if isinstance(event, RunStarted):
            self._begin(event)
        elif isinstance(event, StepDone):
            losses = {f"loss/{term}": value for term, value in event.losses.items()}
            rates = {"learning_rate": event.learning_rate, "images_per_second": event.images_per_second}
            self._target.write(losses | rates, self._at(event.epoch, event.step))
        elif isinstance(event, Retrieved):
            self._target.draw(event.picture(), self._at(event.epoch, self._steps))
        elif isinstance(event, EpochDone) and event.epoch >= self._logged:
            figures = {
                f"{split}/{name}": value for split, found in event.figures.items() for name, value in found.items()
            }
            means = {f"epoch/{term}": value for term, value in event.losses.items()}
            self._target.write(figures | means | {"epoch/seconds": event.seconds}, self._at(event.epoch, self._steps))

    def _begin(self, event: RunStarted) -> None:
        self._steps = event.steps_per_epoch
        epoch, done = event.resumed_at or (0, 0)
        settings = self._settings.replace('"dataset": "auto"', f'"dataset": "{event.dataset}"')
        # the id of the same run in that program, for a resumed run to continue it
        file = event.save_dir / f".{self._kind}.txt"
        before = file.read_text(encoding="utf-8").strip() if event.resumed_at and file.is_file() else None
        match self._kind:
            case "wandb":
                self._target = _Wandb(event.save_dir, settings, before)
            case "mlflow":
                self._target = _Mlflow(event.save_dir, settings, before)
            case _:
                self._target = _TensorBoard(event.save_dir, settings, first=self._at(epoch, done) + 1)
        self._open_files.push(self._close)
        self._logged = epoch if before else 0
        if self._target.name:
            write_text(file, self._target.name)

    def _close(self, error: type[BaseException] | None, *_: object) -> None:
        self._target.close(failed=error is not None)

    def _at(self, epoch: int, step: int) -> int:
        return max(0, (epoch - 1) * self._steps + step)


class _TensorBoard:
    name = ""

    def __init__(self, save_dir: Path, settings: str, first: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # hides the points after the resume state
        self._writer = SummaryWriter(save_dir / "tensorboard", purge_step=first)
        self._writer.add_text("settings", "\n".join(f"    {line}" for line in settings.splitlines()))

    def write(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def draw(self, picture: Tensor, step: int) -> None:
        self._writer.add_image("retrieval", picture, step, dataformats="HWC")

    def close(self, failed: bool) -> None:
        self._writer.close()


class _Wandb:
    """A run of Weights & Biases; ``WANDB_MODE=offline`` writes it into ``wandb/`` of the run directory."""

    def __init__(self, save_dir: Path, settings: str, before: str | None) -> None:
        import wandb

        self._wandb, self.name = wandb, before or uuid4().hex[:8]
        try:
            with redirect_stderr(StringIO()):  # no terminal: it would ask for a key
                self._run = wandb.init(
                    project=os.environ.get("WANDB_PROJECT", "rkd"), name=save_dir.name, dir=save_dir, id=self.name,
                    resume="allow", config=json.loads(settings), settings=wandb.Settings(silent=True, console="off"),
                )  # fmt: skip
        except wandb.Error as error:
            remedy = "WANDB_MODE=offline logs into the run directory."
            raise SettingsError(f"--log wandb: {first_line(error)} {remedy}") from None

    def write(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def draw(self, picture: Tensor, step: int) -> None:
        self._run.log({"retrieval": self._wandb.Image(picture.numpy())}, step=step)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class _Mlflow:
    """A run of MLflow, where ``MLFLOW_TRACKING_URI`` says."""

    def __init__(self, save_dir: Path, settings: str, before: str | None) -> None:
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        from mlflow.entities import Metric, Param
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        self._metric, self._error, self._sent = Metric, MlflowException, list[Any]()
        try:
            self._client = MlflowClient()
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "rkd")
            found = self._client.get_experiment_by_name(name)
            place = found.experiment_id if found else self._client.create_experiment(name)
            self.name = before or str(self._client.create_run(place, run_name=save_dir.name).info.run_id)
            if before:
                self._client.update_run(before, "RUNNING")
            else:
                values = json.loads(settings).items()
                self._client.log_batch(self.name, params=[Param(name, str(value)) for name, value in values])
        except MlflowException as error:
            raise SettingsError(f"--log mlflow: {first_line(error)}. Check MLFLOW_TRACKING_URI.") from None

    def write(self, values: Mapping[str, float], step: int) -> None:
        now = int(1000 * time.time())  # "@" is not allowed in names
        found = [self._metric(name.replace("@", "_at_"), value, now, step) for name, value in values.items()]
        self._sent = [self._client.log_batch(self.name, found, synchronous=False)]

    def draw(self, picture: Tensor, step: int) -> None:
        self._client.log_image(self.name, picture.numpy(), key="retrieval", step=step)

    def close(self, failed: bool) -> None:
        try:
            for last in self._sent:
                last.wait()
            self._client.set_terminated(self.name, "FAILED" if failed else "FINISHED")
        except self._error as error:
            raise RunError(f"--log mlflow: {first_line(error)}. The files of the run are whole.") from None
