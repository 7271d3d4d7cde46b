"""Schemas of the files that the program writes: checkpoint headers, metrics, results and resume states.

Reading is strict: a missing, unknown or invalid field means that the file is damaged.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from rkd_cli import __version__

# bounds of settings and checkpoints: equal, so that every checkpoint written can be read
MAX_SIDE = 8192  # pixels
MAX_EMBEDDING = 65536
BASE = r"((timm|torchvision):)?[\w.]+"  # the name of a network

_Finite = Annotated[float, Field(allow_inf_nan=False)]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_as_tuple = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
Recalls = dict[int, Annotated[float, Field(ge=0, le=1)]]  # {k: Recall@k, a fraction}; the keys are strings in JSON
Agreement = dict[str, Annotated[float, Field(ge=0, le=1)]]  # {metric: fraction}, see ``metrics.agreement``
OVERLAP = "overlap@10"  # picks the best epoch if there are no labels
Selection = Literal["eval", "val"]  # the split whose Recall@1 or overlap picked the best epoch
Fit = Literal["square", "crop", "pad"]  # how an image becomes square
OWN_FIT: Fit = "square"  # for your own photos: crop measured the same, pad worse
MAX_PIXELS = 250_000_000  # default limit for an image; phones take photos of 200 million pixels
PUBLISHED = ("cub200", "cars196", "sop", "demo")  # data sets that use the published preprocessing


def fit_of(dataset: str, fit: Fit | Literal["auto"] = "auto") -> Fit:
    """``fit``, or for auto the data set's own; the published protocol squashes images to a square."""
    if fit != "auto":
        return fit
    return "square" if dataset in PUBLISHED else OWN_FIT


class _Schema(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", defer_build=True)


class _Growing(_Schema):
    """A schema with fields that older versions reject. Fields in ``later`` are written only if not the default."""

    later: ClassVar[frozenset[str]] = frozenset()

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        unset = {name for name in self.later if getattr(self, name) == type(self).model_fields[name].default}
        return {name: value for name, value in handler(self).items() if name not in unset}


class Header(_Growing):
    """Description of a checkpoint, as JSON under ``rkd`` in the safetensors metadata.

    A student in its teacher's embedding space has ``teacher_space`` (teacher embeddings scaled to unit length, or as
    given), ``teacher_size``, and in ``projections`` the prefix sizes for which it has a tensor ``projection.N`` into
    that space.
    """

    later = frozenset({"teacher_space", "teacher_size", "projections"})

    format: Literal[1] = 1
    base: str = Field(pattern=rf"^{BASE}\z", max_length=200)
    embedding_size: int = Field(ge=1, le=MAX_EMBEDDING)
    l2normalize: bool
    resize: int = Field(ge=1, le=MAX_SIDE)
    image_size: int = Field(ge=1, le=MAX_SIDE)
    fit: Fit = "square"  # missing in files of older versions
    mean: Annotated[tuple[_Finite, _Finite, _Finite], _as_tuple]
    std: Annotated[tuple[_Positive, _Positive, _Positive], _as_tuple]
    bgr255: bool = False
    input_size: int | None = Field(default=None, ge=1, le=MAX_SIDE)
    dataset: str = Field(max_length=200)
    epoch: int = Field(ge=0, le=10**9)
    train_recall: Annotated[Recalls, Field(max_length=100)]
    eval_recall: Annotated[Recalls, Field(max_length=100)]
    select_on: Selection | None = None  # None in files of older versions and imported ones
    # digests of the classes trained on, see data/splits
    seen_classes: Annotated[tuple[Annotated[str, Field(max_length=64)], ...], _as_tuple] = ()
    teacher_space: Literal["unit", "given"] | None = None
    teacher_size: int | None = Field(default=None, ge=1, le=MAX_EMBEDDING)
    projections: Annotated[tuple[int, ...], _as_tuple] = Field(default=(), max_length=1000)
    version: str = Field(default=__version__, max_length=50)

    @model_validator(mode="after")
    def _in_one_space(self) -> Self:
        if (self.teacher_space is None) != (self.teacher_size is None) or (self.projections and not self.teacher_size):
            raise ValueError("teacher_space and teacher_size need each other, and projections need both")
        if not all(1 <= size <= self.embedding_size for size in self.projections):
            raise ValueError("projections must be between 1 and embedding_size")
        return self


class Exported(_Growing):
    """Description of an exported file, as JSON under ``rkd`` in its metadata.

    ``projected_from`` is the network's own embedding size if the file returns embeddings in its teacher's space.
    """

    later = frozenset({"projected_from"})

    format: Literal[1] = 1
    header: Header  # of the checkpoint
    parameters: int = Field(ge=0, le=10**12)  # trainable ones
    weights: Literal["float", "int8"]
    projected_from: int | None = Field(default=None, ge=1, le=MAX_EMBEDDING)


class EpochRow(_Schema):
    """A line of ``metrics.jsonl``. Epoch 0 is the network before training; recalls that were not measured are empty."""

    epoch: int = Field(ge=0)
    losses: dict[str, float] = {}  # means over the epoch, each term with its ratio applied
    learning_rate: float = 0.0  # of the last step
    train_recall: Recalls = {}
    eval_recall: Recalls = {}
    val_recall: Recalls = {}  # on the validation split
    train_agreement: Agreement = {}  # with the teacher, instead of recalls if there are no labels
    eval_agreement: Agreement = {}
    val_agreement: Agreement = {}
    seconds: _Seconds
    images_per_second: _Seconds = 0.0
    is_best: bool

    @property
    def is_measured(self) -> bool:
        """Whether this epoch was evaluated."""
        return bool(self.eval_recall or self.eval_agreement)

    @property
    def score(self) -> float:
        """The metric that picks the best epoch."""
        if self.eval_recall:
            return (self.val_recall or self.eval_recall)[1]
        return (self.val_agreement or self.eval_agreement)[OVERLAP]


class Position(_Schema):
    """Position of a run in ``state.safetensors``: ``step`` steps of ``epoch`` are done.

    Batches, crops and all other draws depend only on seed, epoch and step, so no sampler or generator state is stored.
    """

    format: Literal[2] = 2
    epoch: int = Field(default=0, ge=0)
    step: int = Field(default=0, ge=0)
    sums: dict[str, float] = {}  # of each loss term over these steps
    epoch_seconds: _Seconds = 0.0  # of the epoch so far
    seconds: _Seconds = 0.0  # of the run so far
    rows: tuple[EpochRow, ...] = ()
    teacher_train_recall: Recalls = {}
    teacher_eval_recall: Recalls = {}
    inputs: dict[str, str] = {}  # {input file: digest}


class Result(_Schema):
    """``result.json``: best and final recalls, or agreements with the teacher if there are no labels."""

    selected_on: Selection
    best_epoch: int
    best_train_recall: float | None  # None if the training split is not measured
    best_eval_recall: float | None  # None without labels
    final_train_recall: float | None
    final_eval_recall: float | None
    best_eval_recalls: Recalls
    best_train_agreement: Agreement = {}
    best_eval_agreement: Agreement = {}
    final_train_agreement: Agreement = {}
    final_eval_agreement: Agreement = {}
    seconds: float
