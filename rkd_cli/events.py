"""What a run tells the outside while it works: facts alone. What is made of them is the business of a Reporter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from rkd_cli.schemas import EpochDone, Figures, Result

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class SplitFacts:
    """The images of a split: train, val or eval. Photos without labels have no classes."""

    name: str
    images: int
    classes: int


@dataclass(frozen=True)
class NetworkFacts:
    """A network as its header describes it; ``path`` is the checkpoint that it comes from, if any."""

    base: str
    parameters: int
    embedding_size: int
    l2normalize: bool
    path: Path | None = None


@dataclass(frozen=True)
class ObjectiveFacts:
    """{term: ratio} of the loss, for so many epochs; None: for all that are left."""

    ratios: Mapping[str, float]
    epochs: int | None = None


@dataclass(frozen=True)
class RunStarted:
    """What a training is going to do."""

    command: str
    dataset: str
    splits: tuple[SplitFacts, ...]
    network: NetworkFacts
    teacher: NetworkFacts | None
    objectives: tuple[ObjectiveFacts, ...]  # one after another
    sample: str | None  # how a loss on labels picks its negatives
    device: str
    precision: str
    reader: str  # where pixels come from
    save_dir: Path
    epochs: int
    steps_per_epoch: int
    resumed_at: tuple[int, int] | None = None  # epoch, and the steps of it that are done
    shared: Mapping[str, object] = field(default_factory=dict)  # settings of the images that are no defaults


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

    figures: Figures


@dataclass(frozen=True)
class StepDone:
    """A training step; ``losses`` are the means over the epoch so far, each term with its ratio applied."""

    epoch: int
    step: int
    losses: Mapping[str, float]
    learning_rate: float
    images_per_second: float


@dataclass(frozen=True)
class Retrieved:
    """The evaluation images are embedded; ``picture`` makes (H, W, 3) uint8 of what some of them find.

    It holds the embeddings: whoever keeps this event keeps them.
    """

    epoch: int
    picture: Callable[[], Tensor]


@dataclass(frozen=True)
class RunDone:
    """A run that is complete. ``model_bytes``: the size of a model's file; ``milliseconds``: what the best model takes
    for an image on one thread of the CPU, None where nobody has measured it."""

    result: Result
    saved: tuple[Path, ...] = field(default=())
    model_bytes: int = 0
    milliseconds: float | None = None


Event = RunStarted | Note | Progress | TeacherEvaluated | StepDone | Retrieved | EpochDone | RunDone


class Reporter(Protocol):
    """Anything that can be told an event."""

    def __call__(self, event: Event, /) -> None: ...


def silent(event: Event, /) -> None:
    """A Reporter that keeps quiet."""
