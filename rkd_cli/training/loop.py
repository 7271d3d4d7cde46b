"""The training loop of teacher and student."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest

import torch
from torch import Tensor, nn

from rkd_cli.data import ImageSet
from rkd_cli.data.loader import Batch, EvalLoader, TrainLoader
from rkd_cli.embedding.batches import embed
from rkd_cli.errors import Interrupted, RunError
from rkd_cli.events import Note, Reporter, Retrieved, RunDone, RunStarted, StepDone, TeacherEvaluated
from rkd_cli.metrics import agreement, at_r, recall_at_k
from rkd_cli.models import EmbeddingNet
from rkd_cli.models.embedding_net import freeze_statistics
from rkd_cli.models.inference import folded
from rkd_cli.report.picture import draw_retrieval
from rkd_cli.runtime.context import Context, naming_memory
from rkd_cli.schemas import EpochDone, Figures, Header, Position, Result, leading
from rkd_cli.training.run_directory import RunDirectory
from rkd_cli.training.schedule import LearningRate
from rkd_cli.training.step import sum_gradients, update_weights
from rkd_cli.training.teachers import Teacher

AT_R = ("R-Precision", "MAP@R")  # figures that are measured only if one of them picks the best epoch
_FALLING = 3  # measured epochs
_SECONDS_BETWEEN_READS = 0.25  # reading losses synchronizes the device
_EmbedSplit = Callable[..., tuple[Tensor, Tensor]]  # ``Teacher.embed``


@dataclass(frozen=True)
class Run:
    """All that the loop needs; ``open_run`` makes it from a plan."""

    started: RunStarted
    context: Context
    model: EmbeddingNet
    embedder: nn.Module  # embeds batches: the model, or its head if batches are features
    trained: nn.Module  # what the step runs: the embedder, or a form of it with the same parameters
    losses: nn.Module  # with their weights and queues
    teacher: Teacher | None
    step: Callable[[Batch, int], dict[str, Tensor]]  # (batch, epoch) -> {name: ratio * loss}
    optimizer: torch.optim.Optimizer
    learning_rate: LearningRate
    loader: TrainLoader
    augment: Callable[[Tensor], Tensor]  # of training images, on the device
    evaluation: Mapping[str, EvalLoader]  # measured splits: eval, and perhaps train and val
    pictured: EvalLoader  # pixels of eval, also where evaluation has features
    freeze_bn: bool
    epochs: int
    eval_every: int  # epochs
    save_every: int  # seconds
    keep_state: bool  # of the finished run
    ks: tuple[int, ...]
    select_by: str | None  # the figure that picks the best epoch, if it is not the leading one
    patience: int | None  # evaluations without a better one that end the run
    header: Header  # of the checkpoints, without epoch and recalls
    directory: RunDirectory

    @property
    def learner(self) -> nn.Module:
        """Network and losses, which the resume state contains."""
        return learner(self.model, self.losses)

    @property
    def has_labels(self) -> bool:
        """Whether recall is measured; without labels, agreement with the teacher is."""
        return self.evaluation["eval"].images.labels is not None

    def begin_training(self) -> None:
        """Put network and losses into training mode."""
        self.trained.train()
        if self.freeze_bn:
            freeze_statistics(self.trained)
        self.losses.train()

    def sum_gradients(self) -> None:
        """See ``step.sum_gradients``."""
        sum_gradients(self.context.ranks, self.embedder, self.losses)

    def embed(self, images: ImageSet, batches: Iterable[Batch], report: Reporter, what: str) -> tuple[Tensor, Tensor]:
        """See ``Teacher.embed``."""
        network = folded(self.embedder, len(images))
        return embed(network, batches, len(images), self.context, report, what)


def learner(model: EmbeddingNet, losses: nn.Module) -> nn.Module:
    """Network and losses as one module, which names the tensors of the resume state."""
    return nn.ModuleDict({"network": model, "losses": losses})


def train(run: Run, report: Reporter) -> RunDone:
    """Evaluate, then train, evaluate and save each epoch. A resumed run continues from its resume state.

    Raises:
        DataError: damaged images.
        RunError: a loss or weight is not finite, memory is full, or the disk cannot be written.
        Interrupted: a stop was requested; the run is saved.
    """
    report(run.started)
    _agree_on_state(run)
    _share_weights(run)
    with run.directory.locked():
        at = run.directory.begin(run.model, run.header)
        journal = _Journal(run, at)
        targets: dict[str, Tensor] = {}  # the teacher's embeddings of the measured splits
        if run.teacher is not None and not run.has_labels and at.epoch <= run.epochs:
            targets = _targets(run, run.teacher, report, journal, at)
        elif run.teacher is not None and run.has_labels:
            if not at.figures:
                splits = [split for split in ("train", "eval") if run.teacher.has(split)]
                at = _replace(at, figures=_recalls(run, run.teacher.embed, report, journal, at, splits))
            report(TeacherEvaluated(at.figures))
        for row in at.rows:
            report(row)
        journal.begin_epoch(at)
        if at.epoch == 0:
            at = _end_epoch(run, at, report, journal, targets)

        for epoch in range(at.epoch, run.epochs + 1):
            if _has_stalled(run, at.rows):
                break
            run.begin_training()
            losses = _Losses(run, at)
            for step, batch in enumerate(run.loader.epoch(epoch, at.step), at.step + 1):
                terms = train_step(run, batch, epoch, step)
                losses.add(terms, run.loader.batch)
                is_due = journal.is_due()
                if losses.are_due() or step == len(run.loader) or is_due:
                    at = _replace(at, step=step, sums=losses.read(epoch, step))  # a sync
                    report(losses.event(epoch, step))
                    if is_due:
                        journal.save(at)
            at = _end_epoch(run, at, report, journal, targets, losses.images_per_second())

        result = _result(run, at.rows, journal.seconds())
    report(result)
    return result


def _share_weights(run: Run) -> None:
    """Copy the main process's weights to all ranks: those computed in closed form may differ in the last bit."""
    ranks = run.context.ranks
    if ranks.size > 1:
        for tensor in run.learner.state_dict().values():
            tensor.copy_(ranks.sum(tensor if ranks.is_first else torch.zeros_like(tensor)))


def _agree_on_state(run: Run) -> None:
    """Wait until all ranks have read the resume state, and check that it is the same one."""
    ranks, resumed = run.context.ranks, run.directory.resumed
    ranks.wait()
    position = resumed.epoch * 10**9 + resumed.step if resumed else -1
    if ranks.largest(position) != -ranks.largest(-position):
        raise RunError(
            f"--save-dir {run.directory.path}: processes read different resume states. Use a folder that all share."
        )


def train_step(run: Run, batch: Batch, epoch: int, step: int) -> dict[str, Tensor]:
    """Update the weights and return the losses."""
    where = f"epoch {epoch}, step {step}"
    # a seed per step for miners and dropout: a resumed run draws the same numbers
    run.context.seed_torch("step", epoch, step)
    for group in run.optimizer.param_groups:
        group["lr"] = run.learning_rate(epoch, step) * group["lr_ratio"]
    try:
        with naming_memory(where):
            images = run.augment(run.context.to_device(batch.images))
            terms = run.step(batch._replace(images=images), epoch)
            update_weights(run.optimizer, terms, run.sum_gradients)
    except FloatingPointError as error:
        raise RunError(f"{where}: {error}") from None
    return terms


def _end_epoch(
    run: Run,
    at: Position,
    report: Reporter,
    journal: _Journal,
    targets: Mapping[str, Tensor],
    images_per_second: float = 0.0,
) -> Position:
    """Evaluate and save an epoch. Returns the position of the next one."""
    epoch = at.epoch
    measured = epoch % run.eval_every == 0 or epoch == run.epochs
    figures = _figures(run, report, journal, at, targets) if measured else {}
    row = EpochDone(
        epoch=epoch,
        losses={name: value / len(run.loader) for name, value in at.sums.items()},
        learning_rate=run.learning_rate(epoch, len(run.loader)) if epoch else 0.0,
        seconds=journal.epoch_seconds(),
        figures=figures,
        images_per_second=images_per_second,
        is_best=False,
    )
    scores = [earlier.score(run.select_by) for earlier in at.rows if earlier.figures]
    row = row.model_copy(update={"is_best": measured and all(row.score(run.select_by) > score for score in scores)})
    done = _replace(at, epoch=epoch + 1, step=0, sums={}, epoch_seconds=0.0, rows=(*at.rows, row))
    journal.begin_epoch(done)
    journal.write(done)  # first: a resumed run can rewrite the other files from it
    run.directory.save_models(done.rows, run.model, run.header)
    report(row)
    if text := _falling(run, done.rows):
        report(Note(text))
    if run.context.stop_requested():
        raise Interrupted
    return done


def _has_stalled(run: Run, rows: Sequence[EpochDone]) -> bool:
    """Whether the last ``patience`` evaluations were not better than one before them."""
    return run.patience is not None and not any(row.is_best for row in _measured(rows)[-run.patience :])


def _measured(rows: Sequence[EpochDone]) -> list[EpochDone]:
    return [row for row in rows if row.figures]


def _falling(run: Run, rows: Sequence[EpochDone]) -> str:
    """A note after ``_FALLING`` measured epochs if all score below the network before training, else ''."""
    first, *scores = [row.score(run.select_by) for row in _measured(rows)]
    if not rows[-1].figures or len(scores) != _FALLING or max(scores) >= first:
        return ""
    return (
        f"the network scored {first:.2%} before training and at most {max(scores):.2%} since: training makes it worse "
        "so far. For a pretrained network, try --freeze-bn, a lower --lr or --backbone-lr."
    )


def _replace(at: Position, **changes: object) -> Position:
    return at.model_copy(update=changes)


class _Journal:
    """Seconds since the run started, without pauses, and since it was last saved."""

    def __init__(self, run: Run, at: Position) -> None:
        self._run, self._clock = run, run.context.clock
        self._saved = self._epoch_start = now = self._clock()
        self._start = now - at.seconds

    def begin_epoch(self, at: Position) -> None:
        self._epoch_start = self._clock() - at.epoch_seconds

    def seconds(self) -> float:
        return self._clock() - self._start

    def epoch_seconds(self) -> float:
        return self._clock() - self._epoch_start

    def is_due(self) -> bool:
        """Whether to save now. All ranks agree on it, which takes some 0.4 ms."""
        context, saved = self._run.context, self._saved
        return context.stop_requested() or context.ranks.any(self._clock() - saved >= self._run.save_every)

    def write(self, at: Position) -> None:
        at = _replace(at, seconds=self.seconds(), epoch_seconds=self.epoch_seconds())
        self._run.directory.save_state(at, self._run.learner, self._run.optimizer)
        self._saved = self._clock()

    def save(self, at: Position) -> None:
        """``write``, then raise Interrupted if a stop was requested."""
        self.write(at)
        if self._run.context.stop_requested():
            raise Interrupted

    def until_stopped(self, batches: EvalLoader, at: Position) -> Iterator[Batch]:
        """The batches of an evaluation; ``save`` if a stop is requested. All ranks do equally many rounds."""
        for _, batch in zip_longest(range(batches.rounds), batches):
            if self._run.context.stop_requested():
                self.save(at)
            if batch is not None:
                yield batch


class _Losses:
    """Sums of the losses of an epoch. Losses stay on the device until they are read, which synchronizes it."""

    def __init__(self, run: Run, at: Position) -> None:
        self._clock, self._learning_rate = run.context.clock, run.learning_rate
        self._sums, self._unread = dict(at.sums), list[dict[str, Tensor]]()
        self._last_read = self._clock()
        # with the part of the epoch before the run was stopped
        self._start, self._images = self._last_read - at.epoch_seconds, at.step * run.loader.batch

    def add(self, terms: dict[str, Tensor], images: int) -> None:
        self._unread.append({name: term.detach() for name, term in terms.items()})
        self._images += images

    def are_due(self) -> bool:
        return self._clock() - self._last_read >= _SECONDS_BETWEEN_READS

    def read(self, epoch: int, last_step: int) -> dict[str, float]:
        """The sums so far. Losses are added one by one, so the result does not depend on when they are read."""
        rows = torch.stack([torch.stack(list(terms.values())) for terms in self._unread]).tolist()
        for step, row in enumerate(rows, last_step - len(rows) + 1):
            for name, value in zip(self._unread[0], row, strict=True):
                if not math.isfinite(value):
                    raise RunError(
                        f"epoch {epoch}, step {step}: the {name} loss is {value}. Lower --lr, or check the images. "
                        "The files of earlier epochs are intact."
                    )
                self._sums[name] = self._sums.get(name, 0.0) + value
        self._unread.clear()
        self._last_read = self._clock()
        return dict(self._sums)

    def event(self, epoch: int, step: int) -> StepDone:
        means = {name: value / step for name, value in self._sums.items()}
        return StepDone(epoch, step, means, self._learning_rate(epoch, step), self.images_per_second())

    def images_per_second(self) -> float:
        seconds = self._clock() - self._start
        return self._images / seconds if seconds else 0.0


def _figures(run: Run, report: Reporter, journal: _Journal, at: Position, targets: Mapping[str, Tensor]) -> Figures:
    embed_split = partial(_embed_and_picture, run, at.epoch)
    if run.has_labels:
        return _recalls(run, embed_split, report, journal, at, run.evaluation)
    space, found = run.model.teacher_space, Figures()
    for split, target in targets.items():
        own, _ = _embeddings(run, embed_split, report, journal, at, split)
        found[split] = dict(agreement(own, target, queries=space.project(own) if space else None))
    return found


def _embed_and_picture(
    run: Run, epoch: int, images: ImageSet, batches: Iterable[Batch], report: Reporter, what: str
) -> tuple[Tensor, Tensor]:
    """``Run.embed``, with a Retrieved event for the evaluation split."""
    embeddings, labels = run.embed(images, batches, report, what)
    if images is run.pictured.images:
        report(Retrieved(epoch, partial(draw_retrieval, run.pictured, embeddings, run.context.seed)))
    return embeddings, labels


def _targets(run: Run, teacher: Teacher, report: Reporter, journal: _Journal, at: Position) -> dict[str, Tensor]:
    splits = [split for split in ("val", "train", "eval") if split in run.evaluation]
    return {split: _embeddings(run, teacher.embed, report, journal, at, split)[0] for split in splits}


def _embeddings(
    run: Run, embed_split: _EmbedSplit, report: Reporter, journal: _Journal, at: Position, split: str
) -> tuple[Tensor, Tensor]:
    """(N, D) embeddings and (N,) labels of a measured split."""
    loader = run.evaluation[split]
    return embed_split(loader.images, journal.until_stopped(loader, at), report, f"Evaluating {split} images")


def _recalls(
    run: Run, embed_split: _EmbedSplit, report: Reporter, journal: _Journal, at: Position, splits: Iterable[str]
) -> Figures:
    """Recall@K of the measured ones of ``splits``."""
    found = Figures()
    for split in sorted(run.evaluation.keys() & splits, key=("val", "train", "eval").index):
        embeddings, labels = _embeddings(run, embed_split, report, journal, at, split)
        protocol = run.evaluation[split].images.protocol
        recalls = recall_at_k(embeddings, labels, run.ks, run.context.ranks, protocol)
        found[split] = {f"R@{k}": recall for k, recall in recalls.items()}
        if run.select_by in AT_R:
            found[split] |= zip(AT_R, at_r(embeddings, labels, run.context.ranks), strict=True)
    return found


def _result(run: Run, rows: tuple[EpochDone, ...], seconds: float) -> RunDone:
    best = next(row for row in reversed(rows) if row.is_best)
    of_train = [found for row in rows if (found := row.figures.get("train"))]
    result = Result(
        selected_on="val" if "val" in best.figures else "eval",
        selected_by=run.select_by,
        best_epoch=best.epoch,
        best=best.figures,
        final=rows[-1].figures,
        best_train=max(of_train, key=lambda found: found[leading(found)], default={}),
        seconds=round(seconds, 1),
        ended_at=rows[-1].epoch if rows[-1].epoch < run.epochs else None,
    )
    directory = run.directory
    directory.save_result(result, run.keep_state)
    saved = tuple(directory.path / name for name in ("best.safetensors", "last.safetensors"))
    return RunDone(result, saved, saved[0].stat().st_size if directory.writes else 0)
