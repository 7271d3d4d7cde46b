"""The training loop of teacher and student alike."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rkd_cli.checkpoint import Header
from rkd_cli.data.batches import EvalBatches, TrainBatches
from rkd_cli.engine.evaluate import evaluate
from rkd_cli.engine.rundir import RunDirectory
from rkd_cli.errors import RunError
from rkd_cli.events import EpochDone, Reporter, RunDone, RunStarted, StepDone, TeacherEvaluated
from rkd_cli.models import EmbeddingNet
from rkd_cli.runtime import derive_seed

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
    batches: TrainBatches
    train_eval: EvalBatches | None  # None: the training classes are not measured
    evaluation: EvalBatches
    validation: EvalBatches | None  # training classes held out to pick the best epoch
    epochs: int
    eval_every: int  # epochs
    ks: tuple[int, ...]
    seed: int
    device: torch.device
    precision: str
    header: Header  # of the model files, without epoch and recalls
    directory: RunDirectory


def train(run: Run, report: Reporter) -> RunDone:
    """Evaluate, then for each epoch train, evaluate, save, report.

    Raises:
        DataError: damaged images.
        RunError: a loss that is not finite, or a disk that cannot be written.
    """
    report(run.started)
    start = time.monotonic()
    if run.teacher is not None:
        train_recall, eval_recall, _ = _recalls(run, run.teacher, report)
        report(TeacherEvaluated(train_recall, eval_recall))

    for epoch in range(run.epochs + 1):
        epoch_start = time.monotonic()
        losses, images_per_second = _train_epoch(run, epoch, report) if epoch else ({}, 0.0)
        measured = epoch % run.eval_every == 0 or epoch == run.epochs
        train_recall, eval_recall, val_recall = _recalls(run, run.model, report) if measured else ({}, {}, {})
        done = EpochDone(
            epoch=epoch,
            losses=losses,
            learning_rate=run.learning_rate(epoch) if epoch else 0.0,
            train_recall=train_recall,
            eval_recall=eval_recall,
            seconds=time.monotonic() - epoch_start,
            images_per_second=images_per_second,
            is_best=False,
            val_recall=val_recall,
        )
        scores = [row.score for row in run.directory.metrics if row.eval_recall]
        done = replace(done, is_best=measured and all(done.score > score for score in scores))
        run.directory.save_epoch(done, run.model.state_dict(), _header_of(run.header, done))
        report(done)

    result = _result(run.directory, time.monotonic() - start)
    report(result)
    return result


def _train_epoch(run: Run, epoch: int, report: Reporter) -> tuple[dict[str, float], float]:
    """Mean of each loss term over the epoch, and images a second."""
    run.model.train()
    rate, terms_of_batch = run.learning_rate(epoch), run.terms_of(epoch)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    names: list[str] = []
    unread: list[Tensor] = []  # losses still on the device
    sums: list[float] = []
    start = last_read = time.monotonic()
    images_seen = 0

    for step, (images, labels) in enumerate(run.batches.epoch(epoch), 1):
        # every step draws (miners, dropout) from a seed of its own: nothing hangs on what was drawn before
        torch.manual_seed(derive_seed(run.seed, "step", epoch, step))
        terms = _terms(terms_of_batch, images, labels, run.device, epoch, step)
        loss = torch.stack(list(terms.values())).sum()
        run.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        run.optimizer.step()

        names = list(terms)
        unread.append(torch.stack([term.detach() for term in terms.values()]))
        images_seen += len(images)
        now = time.monotonic()
        if now - last_read >= _SECONDS_BETWEEN_READS or step == len(run.batches):
            sums = _read(unread, sums, names, epoch, step)  # a sync
            unread.clear()
            last_read = now
            means = {name: value / step for name, value in zip(names, sums, strict=True)}
            report(StepDone(epoch, step, means, rate, images_seen / (time.monotonic() - start)))

    seconds = time.monotonic() - start
    return {name: value / len(run.batches) for name, value in zip(names, sums, strict=True)}, images_seen / seconds


def _terms(
    terms: Terms, images: Tensor, labels: Tensor, device: torch.device, epoch: int, step: int
) -> dict[str, Tensor]:
    try:
        return terms(images.to(device, non_blocking=True), labels.to(device, non_blocking=True))
    except FloatingPointError as error:
        raise RunError(f"epoch {epoch}, step {step}: {error}") from None


def _read(unread: list[Tensor], sums: list[float], names: list[str], epoch: int, last_step: int) -> list[float]:
    """Add the losses of the last few steps to the sums.

    Raises:
        RunError: one of them is not finite.
    """
    rows = torch.stack(unread).tolist()
    for step, row in enumerate(rows, last_step - len(rows) + 1):
        for name, value in zip(names, row, strict=True):
            if not math.isfinite(value):
                raise RunError(
                    f"epoch {epoch}, step {step}: the {name} loss is {value}: lower --lr, or look at the images; "
                    "the files of the epochs before are whole"
                )
    return [sum(column) for column in zip(*([sums] if sums else []), *rows, strict=True)]


def _recalls(run: Run, model: EmbeddingNet, report: Reporter) -> tuple[dict[int, float], ...]:
    """Of the training, the evaluation and the validation classes; empty for those that are not measured."""

    def recall(batches: EvalBatches | None, what: str) -> dict[int, float]:
        if batches is None:
            return {}
        return evaluate(model, batches, run.ks, run.device, run.precision, report, f"Evaluating {what} classes")

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


def _result(directory: RunDirectory, seconds: float) -> RunDone:
    best = next(row for row in reversed(directory.metrics) if row.is_best)
    final = directory.metrics[-1]
    result = RunDone(
        best_epoch=best.epoch,
        best_train_recall=max((row.train_recall[1] for row in directory.metrics if row.train_recall), default=None),
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
