"""Progress events that a run emits. A Reporter displays or logs them."""

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
    """The size of a split: train, val or eval. Images without labels have 0 classes; 0 queries: no roles."""

    name: str
    images: int
    classes: int
    queries: int = 0
    gallery: int = 0
    cameras: int = 0


@dataclass(frozen=True)
class NetworkFacts:
    """A network as its header describes it; ``path`` is its checkpoint, if any."""

    base: str
    parameters: int
    embedding_size: int
    l2normalize: bool
    path: Path | None = None


@dataclass(frozen=True)
class ObjectiveFacts:
    """{term: ratio} of the loss for a number of epochs, None for all remaining ones."""

    ratios: Mapping[str, float]
    epochs: int | None = None


@dataclass(frozen=True)
class RunStarted:
    """A training starts."""

    command: str
    dataset: str
    splits: tuple[SplitFacts, ...]
    network: NetworkFacts
    teacher: NetworkFacts | None
    objectives: tuple[ObjectiveFacts, ...]  # in order
    sample: str | None  # the miner
    device: str
    precision: str
    reader: str  # where pixels come from
    save_dir: Path
    epochs: int
    steps_per_epoch: int
    resumed_at: tuple[int, int] | None = None  # epoch, and its completed steps
    shared: Mapping[str, object] = field(default_factory=dict)  # image settings that differ from the defaults


@dataclass(frozen=True)
class Note:
    """A warning or hint for the user."""

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
    """The teacher's recalls on the same images."""

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
    """The evaluation split is embedded; ``picture`` draws example queries as (H, W, 3) uint8.

    The event references all embeddings, so do not store it.
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
    """A callable that receives events."""

    def __call__(self, event: Event, /) -> None: ...


def silent(event: Event, /) -> None:
    """A Reporter that does nothing."""
