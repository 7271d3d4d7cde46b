"""Schemas of the files that the program writes: checkpoint headers, metrics, results and resume states.

Reading is strict: a missing, unknown or invalid field means that the file is damaged.
"""

from __future__ import annotations

from collections.abc import Mapping
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
BASE = r"((timm|torchvision|transformers):)?[\w.-]+"  # the name of a network

_Finite = Annotated[float, Field(allow_inf_nan=False)]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_as_tuple = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
Recalls = dict[int, Annotated[float, Field(ge=0, le=1)]]  # {k: Recall@k, a fraction}; JSON has the keys as strings
_Fraction = Annotated[float, Field(ge=0, le=1)]
SPLITS = ("train", "val", "eval")
Figures = dict[str, dict[str, _Fraction]]  # {split: {name: fraction}}; names as R@1, or those of ``metrics.agreement``
OVERLAP = "overlap@10"  # what picks the best epoch where there are no labels
Selection = Literal["eval", "val"]  # the split whose Recall@1 or overlap picked the best epoch
Fit = Literal["square", "crop", "pad"]  # how an image becomes square
OWN_FIT: Fit = "square"  # for your own photos: crop measured the same, pad worse
PADDING = (124, 116, 104)  # of Fit pad: the mean color of ImageNet, about 0 after normalization, like zero padding
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
    that space. A file of several teachers has (name, digest) of each in ``teachers``.
    """

    later = frozenset({"teacher_space", "teacher_size", "projections", "teachers"})

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
    teachers: Annotated[tuple[Annotated[tuple[str, str], _as_tuple], ...], _as_tuple] = Field(
        default=(), max_length=100
    )
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
    ``input`` says whether the file takes uint8 pixels, or floats that are normalized by the header's mean and std.
    """

    later = frozenset({"projected_from", "input", "opset"})

    format: Literal[1] = 1
    header: Header  # of the checkpoint
    parameters: int = Field(ge=0, le=10**12)  # trainable ones
    weights: Literal["float", "int8", "int8-weights", "fp16"]
    input: Literal["uint8", "float"] = "uint8"
    opset: int | None = Field(default=None, ge=1, le=10**6)  # of ONNX; None in files of older versions
    projected_from: int | None = Field(default=None, ge=1, le=MAX_EMBEDDING)


def leading(figures: Mapping[str, float]) -> str:
    """The name of the figure that picks the best epoch: Recall@1, or the overlap where there are no labels."""
    return "R@1" if "R@1" in figures else OVERLAP


def _figures_of_before(values: Any) -> Any:
    """The fields of an epoch or of a state, their figures as this version has them."""
    if not isinstance(values, dict) or "figures" in values:
        return values
    found, rest = {}, dict(values)
    for prefix in ("", "teacher_"):
        for split in SPLITS:
            recall, agreement = (rest.pop(f"{prefix}{split}_{kind}", {}) for kind in ("recall", "agreement"))
            if not isinstance(recall, dict) or not isinstance(agreement, dict):
                return values  # which no version wrote
            if recall or agreement:
                found[split] = {f"R@{k}": value for k, value in recall.items()} | agreement
    return rest | {"figures": found}


class EpochDone(_Schema):
    """An epoch that is evaluated and saved: a line of ``metrics.jsonl``, and an event.

    Epoch 0 is the network before training and has no losses. ``figures`` hold fractions by split and name, for
    instance ``figures["eval"]["R@1"]``; without labels they are the agreement with the teacher. What was not measured
    is absent.
    """

    epoch: int = Field(ge=0)
    losses: dict[str, float] = {}  # means over the epoch, each term with its ratio applied
    learning_rate: float = 0.0  # of the last step
    figures: Figures = {}
    seconds: _Seconds
    images_per_second: _Seconds = 0.0
    is_best: bool

    _of_before = model_validator(mode="before")(_figures_of_before)

    def score(self, figure: str | None = None) -> float:
        """What picks the best epoch: ``figure``, by default the leading one."""
        found = self.figures.get("val") or self.figures["eval"]
        return found[figure or leading(found)]


class Position(_Schema):
    """Position of a run in ``state.safetensors``: ``step`` steps of ``epoch`` are done.

    Batches, crops and all other draws depend only on seed, epoch and step, so no sampler or generator state is stored.
    """

    format: Literal[2] = 2
    epoch: int = Field(default=0, ge=0)
    step: int = Field(default=0, ge=0)
    sums: dict[str, float] = {}  # of each loss term over these steps
    epoch_seconds: _Seconds = 0.0  # spent on the epoch so far
    seconds: _Seconds = 0.0  # spent on the run so far
    rows: Annotated[tuple[EpochDone, ...], _as_tuple] = ()
    figures: Figures = {}  # of the teacher
    inputs: dict[str, str] = {}  # what the run reads, each with a digest

    _of_before = model_validator(mode="before")(_figures_of_before)


class Result(_Growing):
    """``result.json``: the figures of the best and of the last epoch."""

    later = frozenset({"selected_by", "ended_at"})

    selected_on: Selection
    selected_by: str | None = None  # the figure that --select-by names
    best_epoch: int
    best: Figures
    final: Figures
    best_train: dict[str, _Fraction] = {}  # the highest of any epoch
    ended_at: int | None = None  # the epoch at which --patience ended the run
    seconds: float

    @model_validator(mode="before")
    @classmethod
    def _of_before(cls, values: Any) -> Any:
        """A file of an earlier version."""
        if not isinstance(values, dict) or not isinstance(values.get("best_eval_recalls"), dict):
            return values
        recalls = {f"R@{k}": value for k, value in values["best_eval_recalls"].items()}

        def first(what: str) -> dict[str, float]:
            recall = values.get(f"{what}_recall")
            return values.get(f"{what}_agreement") or ({} if recall is None else {"R@1": recall})

        final = {split: figures for split in ("train", "eval") if (figures := first(f"final_{split}"))}
        best = {"eval": recalls or first("best_eval")}
        kept = {name: values[name] for name in ("selected_on", "best_epoch", "seconds") if name in values}
        return kept | {"best": best, "final": final, "best_train": first("best_train")}
