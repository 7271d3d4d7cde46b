"""The training loop of teacher and student alike."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rkd_cli.data.loader import EvalLoader, TrainLoader
from rkd_cli.errors import Interrupted, RunError
from rkd_cli.events import EpochDone, Event, Reporter, RunDone, RunStarted, StepDone, TeacherEvaluated
from rkd_cli.inference.embed import evaluate
from rkd_cli.models import EmbeddingNet
from rkd_cli.models.checkpoint import Header
from rkd_cli.runtime.device import derive_seed
from rkd_cli.training.run_directory import RunDirectory
from rkd_cli.training.state import Position

_SECONDS_BETWEEN_READS = 0.25  # reading losses waits for the device


Terms = Callable[[Tensor, Tensor], dict[str, Tensor]]  # (images, labels) -> {name: ratio * loss}


@dataclass(frozen=True)
class Run:
    """All that the loop needs. ``engine/build.py`` makes it from settings."""

    started: RunStarted
    model: EmbeddingNet
    teacher: EmbeddingNet | None
    terms_of: Callable[[int], Terms]  # of an epoch, counted from 1
    optimizer: torch.optim.Optimizer
    learning_rate: Callable[[int], float]  # of an epoch, counted from 1
    batches: TrainLoader
    train_eval: EvalLoader | None  # None: the training classes are not measured
    evaluation: EvalLoader
    validation: EvalLoader | None  # training classes held out to pick the best epoch
    epochs: int
    eval_every: int  # epochs
    save_every: int  # seconds
    ks: tuple[int, ...]
    seed: int
    device: torch.device
    precision: str
    header: Header  # of the model files, without epoch and recalls
    directory: RunDirectory


def train(run: Run, report: Reporter, stopping: Callable[[], bool] = lambda: False) -> RunDone:
    """Evaluate, then for each epoch train, evaluate, save, report; from where the run stood, if it is resumed.

    Args:
        stopping: asked after each step and each batch of an evaluation; at its yes the run saves where it stands.
    Raises:
        DataError: damaged images.
        RunError: a loss that is not finite, or a disk that cannot be written.
        Interrupted: ``stopping`` said yes.
    """
    report(run.started)
    with run.directory.held():
        run.directory.restore(run.model, run.optimizer)
        journal = _Journal(run, stopping)
        at = run.directory.resumed or Position()
        if run.teacher is not None:
            teacher = at.teacher or TeacherEvaluated(*_recalls(run, run.teacher, report, journal, at)[:2])
            at = at.model_copy(update={"teacher": teacher})
            report(teacher)
        for row in at.rows:
            report(row)
        journal.begin_epoch(at)

        while at.epoch <= run.epochs:
            epoch = at.epoch
            if epoch:
                at, images_per_second = _train_epoch(run, at, report, journal)
            measured = epoch % run.eval_every == 0 or epoch == run.epochs
            recalls = _recalls(run, run.model, report, journal, at) if measured else ({}, {}, {})
            train_recall, eval_recall, val_recall = recalls
            done = EpochDone(
                epoch=epoch,
                losses={name: value / len(run.batches) for name, value in at.sums.items()},
                learning_rate=run.learning_rate(epoch) if epoch else 0.0,
                train_recall=train_recall,
                eval_recall=eval_recall,
                seconds=journal.epoch_seconds(),
                images_per_second=images_per_second if epoch else 0.0,
                is_best=False,
                val_recall=val_recall,
            )
            scores = [row.score for row in at.rows if row.eval_recall]
            done = replace(done, is_best=measured and all(done.score > score for score in scores))
            rows = (*at.rows, done)
            run.directory.save_epoch(rows, run.model, _header_of(run.header, done))
            report(done)
            at = Position(epoch=epoch + 1, rows=rows, teacher=at.teacher)
            journal.begin_epoch(at)
            journal.save(at)

        result = _result(run.directory, at.rows, journal.seconds())
    report(result)
    return result


class _Journal:
    """When the run began, counted over all its resumptions, and when it was last saved."""

    def __init__(self, run: Run, stopping: Callable[[], bool]) -> None:
        self._run, self.stopping = run, stopping
        self._saved = self._epoch_start = now = time.monotonic()
        self._start = now - (run.directory.resumed or Position()).seconds

    def begin_epoch(self, at: Position) -> None:
        self._epoch_start = time.monotonic() - at.epoch_seconds

    def seconds(self) -> float:
        return time.monotonic() - self._start

    def epoch_seconds(self) -> float:
        return time.monotonic() - self._epoch_start

    def due(self) -> bool:
        return self.stopping() or time.monotonic() - self._saved >= self._run.save_every

    def save(self, at: Position) -> None:
        """Save where the run stands; an end to it, if one is asked for."""
        times = {"seconds": self.seconds(), "epoch_seconds": self.epoch_seconds()}
        self._run.directory.save_state(at.model_copy(update=times), self._run.model, self._run.optimizer)
        self._saved = time.monotonic()
        if self.stopping():
            raise Interrupted


def _train_epoch(run: Run, at: Position, report: Reporter, journal: _Journal) -> tuple[Position, float]:
    """Where the run stands after the rest of the epoch, and images a second."""
    run.model.train()
    rate, terms_of_batch = run.learning_rate(at.epoch), run.terms_of(at.epoch)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    unread: list[dict[str, Tensor]] = []  # losses still on the device
    start = last_read = time.monotonic()
    images_seen = 0

    for step, (images, labels, _) in enumerate(run.batches.epoch(at.epoch, at.step), at.step + 1):
        # every step draws (miners, dropout) from a seed of its own: nothing hangs on what was drawn before
        torch.manual_seed(derive_seed(run.seed, "step", at.epoch, step))
        terms = _terms(terms_of_batch, images, labels, run.device, at.epoch, step)
        take_step(run.optimizer, terms)

        unread.append({name: term.detach() for name, term in terms.items()})
        images_seen += len(images)
        now = time.monotonic()
        if now - last_read >= _SECONDS_BETWEEN_READS or step == len(run.batches) or journal.due():
            sums = _read(unread, at.sums, at.epoch, step)  # a sync
            at = at.model_copy(update={"step": step, "sums": sums})
            unread.clear()
            last_read = now
            means = {name: value / step for name, value in sums.items()}
            report(StepDone(at.epoch, step, means, rate, images_seen / (time.monotonic() - start)))
            if journal.due():
                journal.save(at)

    return at, images_seen / (time.monotonic() - start)


def take_step(optimizer: torch.optim.Optimizer, terms: dict[str, Tensor]) -> None:
    """Adjust the weights by the gradient of the sum of the terms."""
    loss = torch.stack(list(terms.values())).sum()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def _terms(
    terms: Terms, images: Tensor, labels: Tensor, device: torch.device, epoch: int, step: int
) -> dict[str, Tensor]:
    try:
        return terms(images.to(device, non_blocking=True), labels.to(device, non_blocking=True))
    except FloatingPointError as error:
        raise RunError(f"epoch {epoch}, step {step}: {error}") from None


def _read(unread: list[dict[str, Tensor]], sums: dict[str, float], epoch: int, last_step: int) -> dict[str, float]:
    """The sums with the losses of the last few steps added, one after another, whenever they are read.

    Raises:
        RunError: one of them is not finite.
    """
    sums = dict(sums)
    rows = torch.stack([torch.stack(list(terms.values())) for terms in unread]).tolist()
    for step, row in enumerate(rows, last_step - len(rows) + 1):
        for name, value in zip(unread[0], row, strict=True):
            if not math.isfinite(value):
                raise RunError(
                    f"epoch {epoch}, step {step}: the {name} loss is {value}: lower --lr, or look at the images; "
                    "the files of the epochs before are whole"
                )
            sums[name] = sums.get(name, 0.0) + value
    return sums


def _recalls(
    run: Run, model: EmbeddingNet, report: Reporter, journal: _Journal, at: Position
) -> tuple[dict[int, float], ...]:
    """Of the training, the evaluation and the validation classes; empty for those that are not measured."""

    def watched(event: Event) -> None:
        report(event)
        if journal.stopping():
            journal.save(at)

    def recall(batches: EvalLoader | None, what: str) -> dict[int, float]:
        if batches is None:
            return {}
        return evaluate(model, batches, run.ks, run.device, run.precision, watched, f"Evaluating {what} classes")

    validation = recall(run.validation, "held-out")
    return recall(run.train_eval, "training"), recall(run.evaluation, "unseen"), validation


def _header_of(header: Header, done: EpochDone) -> Header:
    return header.model_copy(
        update={
            "epoch": done.epoch,
            "train_recall": {str(k): value for k, value in done.train_recall.items()},
            "eval_recall": {str(k): value for k, value in done.eval_recall.items()},
        }
    )


def _result(directory: RunDirectory, rows: tuple[EpochDone, ...], seconds: float) -> RunDone:
    best = next(row for row in reversed(rows) if row.is_best)
    final = rows[-1]
    result = RunDone(
        best_epoch=best.epoch,
        best_train_recall=max((row.train_recall[1] for row in rows if row.train_recall), default=None),
        best_eval_recall=best.eval_recall[1],
        final_eval_recall=final.eval_recall[1],
        seconds=seconds,
        saved=(str(directory.path / "best.safetensors"), str(directory.path / "last.safetensors")),
        selected_on="val" if best.val_recall else "eval",
    )
    directory.save_result(
        {
            "selected_on": result.selected_on,
            "best_epoch": result.best_epoch,
            "best_train_recall": result.best_train_recall,
            "best_eval_recall": result.best_eval_recall,
            "final_train_recall": final.train_recall.get(1),
            "final_eval_recall": result.final_eval_recall,
            "best_eval_recalls": {str(k): value for k, value in best.eval_recall.items()},
            "seconds": round(seconds, 1),
        }
    )
    return result
