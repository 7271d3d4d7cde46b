"""What the engine tells the outside while it works. It knows no screen; a Reporter makes of it what it likes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

Recalls = Mapping[int, float]  # {k: fraction of queries whose k nearest neighbours hold a positive}


@dataclass(frozen=True)
class RunStarted:
    """The run's header: ``facts`` are (label, text) rows, shown in order."""

    title: str
    facts: tuple[tuple[str, str], ...]
    epochs: int
    steps_per_epoch: int


@dataclass(frozen=True)
class Note:
    """Something the user should know that stops nothing."""

    text: str


@dataclass(frozen=True)
class Progress:
    """Work of known length outside training: ``done`` of ``total`` units, for instance images or bytes."""

    what: str
    done: int
    total: int
    unit: str = "images"


@dataclass(frozen=True)
class TeacherEvaluated:
    """What the teacher of a distillation reaches on the same images."""

    train_recall: Recalls
    eval_recall: Recalls


@dataclass(frozen=True)
class StepDone:
    """A training step; ``losses`` are the means over the epoch so far, each term with its ratio applied."""

    epoch: int
    step: int
    losses: Mapping[str, float]
    learning_rate: float
    images_per_second: float


@dataclass(frozen=True)
class EpochDone:
    """One line of ``metrics.jsonl``. Epoch 0 is the network before training and has no losses.

    ``val_recall`` is of the training classes held out to pick the best epoch. Recalls that were not measured are empty.
    """

    epoch: int
    losses: Mapping[str, float]
    learning_rate: float
    train_recall: Recalls
    eval_recall: Recalls
    seconds: float
    images_per_second: float
    is_best: bool
    val_recall: Recalls = field(default_factory=dict)

    @property
    def score(self) -> float:
        """What picks the best epoch."""
        return (self.val_recall or self.eval_recall)[1]


@dataclass(frozen=True)
class RunDone:
    """The best and final figures; recalls are fractions. ``selected_on`` says which split picked the best epoch."""

    best_epoch: int
    best_train_recall: float | None  # None where training classes are not measured
    best_eval_recall: float
    final_eval_recall: float
    seconds: float
    saved: tuple[str, ...] = field(default=())
    selected_on: str = "eval"


Event = RunStarted | Note | Progress | TeacherEvaluated | StepDone | EpochDone | RunDone


class Reporter(Protocol):
    """Anything that can be told an event."""

    def __call__(self, event: Event, /) -> None: ...


def silent(event: Event, /) -> None:
    """A Reporter that keeps quiet."""
