"""What can be set: every flag's name, type, default, bounds and help. Nothing else in the program has a default."""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo

from rkd_cli.errors import SettingsError

DATASETS = ("cub200", "folder", "demo")
Dataset = Literal["cub200", "folder", "demo"]
Base = Literal["resnet18", "resnet50", "mobilenet_v3_small", "shufflenet_v2_x0_5", "shufflenet_v2_x1_0"]
Sample = Literal["random", "hard", "all", "semihard", "distance", "distance-published"]


def _split(value: object) -> object:
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return tuple(value) if isinstance(value, list) else value


def _ascending(values: tuple[int, ...]) -> tuple[int, ...]:
    if list(values) != sorted(set(values)):
        raise ValueError(f"must rise from one to the next, got {','.join(map(str, values))}")
    return values


def _with_one(values: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted({1, *values}))


Count = Annotated[int, Field(ge=1)]
Epochs = Annotated[tuple[Count, ...], BeforeValidator(_split), AfterValidator(_ascending)]
Ks = Annotated[tuple[Count, ...], BeforeValidator(_split), AfterValidator(_with_one)]
File = Annotated[Path, Strict(False)]
Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")]
Ratio = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def _flag(default: Any, panel: str, help: str) -> Any:
    return Field(default, description=help, json_schema_extra={"panel": panel})


# a wish of this moment, not a property of the run: settings.json leaves it out
Overwrite = Annotated[
    bool,
    Field(description="Replace a run that --save-dir holds already.", json_schema_extra={"panel": "Run"}, exclude=True),
]


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class _TrainSettings(_Settings):
    """What both trainings share. The subclasses hold the defaults that differ."""

    dataset: Dataset = _flag("cub200", "Data", "The images: cub200, folder (your own, one folder a class) or demo.")
    data: File = _flag(Path("data"), "Data", "Where the images are; for folder, the folder of class folders itself.")
    resize: Count = _flag(256, "Data", "Side of the square every image is resized to first, in pixels.")
    image_size: Count = _flag(224, "Data", "Side of the crop the network sees, in pixels.")
    workers: Annotated[int, Field(ge=0)] | None = _flag(None, "Data", "Processes that decode images; 0: none beside.")

    base: Base = _flag("resnet50", "Model", "Backbone.")
    weights: str = _flag("imagenet", "Model", "Weights to start from: imagenet, none (random), or a file.")
    embedding_size: Count = _flag(512, "Model", "Length of an embedding.")
    l2normalize: bool = _flag(True, "Model", "Scale embeddings to unit length.")
    load: File | None = _flag(None, "Model", "Start from this checkpoint of the same network instead of --weights.")

    lr: Positive = _flag(1e-5, "Optimisation", "Learning rate of Adam.")
    lr_decay_epochs: Epochs = _flag((25, 30, 35), "Optimisation", "Epochs at which the learning rate falls.")
    lr_decay_gamma: Positive = _flag(0.5, "Optimisation", "What the learning rate is multiplied by, each time.")
    weight_decay: Ratio = _flag(1e-5, "Optimisation", "Weight decay of Adam (added to the gradient).")
    epochs: Count = _flag(40, "Optimisation", "Epochs to train.")
    iter_per_epoch: Count = _flag(100, "Optimisation", "Batches an epoch.")
    batch: Annotated[int, Field(ge=2)] = _flag(128, "Optimisation", "Images a batch.")
    num_image_per_class: Count = _flag(5, "Optimisation", "Images of each class in a batch.")
    seed: Annotated[int, Field(ge=0)] = _flag(1, "Optimisation", "Seed of every random draw.")

    save_dir: File = _flag(Path("teacher"), "Run", "Directory for the run's files.")
    overwrite: Overwrite = False
    device: Device = _flag("auto", "Run", "auto, cpu, cuda or cuda:N.")
    precision: Literal["auto", "fp32", "tf32", "bf16"] = _flag("auto", "Run", "Of the networks; losses are in fp32.")
    recall: Ks = _flag((1, 2, 4, 8), "Run", "The K of Recall@K; 1 is always among them, it picks the best epoch.")

    @model_validator(mode="after")
    def _crop_fits(self) -> Self:
        if self.image_size > self.resize:
            raise ValueError(f"--image-size {self.image_size} is larger than --resize {self.resize}")
        return self


class TeacherSettings(_TrainSettings):
    """``rkd train-teacher``."""

    loss: Literal["l2_triplet", "l1_triplet", "contrastive"] = _flag("l2_triplet", "Loss", "Metric-learning loss.")
    sample: Sample = _flag("distance", "Loss", "How negatives are picked.")
    margin: Ratio = _flag(0.2, "Loss", "Margin of the loss.")


class DistillSettings(_TrainSettings):
    """``rkd distill``."""

    base: Base = _flag("resnet18", "Model", "Backbone.")
    embedding_size: Count = _flag(64, "Model", "Length of an embedding.")
    l2normalize: bool = _flag(False, "Model", "Scale embeddings to unit length.")
    lr: Positive = _flag(1e-4, "Optimisation", "Learning rate of Adam.")
    lr_decay_epochs: Epochs = _flag((40, 60), "Optimisation", "Epochs at which the learning rate falls.")
    lr_decay_gamma: Positive = _flag(0.1, "Optimisation", "What the learning rate is multiplied by, each time.")
    epochs: Count = _flag(80, "Optimisation", "Epochs to train.")
    save_dir: File = _flag(Path("student"), "Run", "Directory for the run's files.")

    teacher_load: File = _flag(..., "Distillation", "Checkpoint of the teacher.")
    dist_ratio: Ratio = _flag(1.0, "Distillation", "Weight of the distance-wise loss, RKD-D.")
    angle_ratio: Ratio = _flag(2.0, "Distillation", "Weight of the angle-wise loss, RKD-A.")
    triplet_ratio: Ratio = _flag(0.0, "Distillation", "Weight of the triplet loss on the labels.")
    triplet_sample: Sample = _flag("distance", "Distillation", "How the triplet loss picks negatives.")
    triplet_margin: Ratio = _flag(0.2, "Distillation", "Margin of the triplet loss.")

    @model_validator(mode="after")
    def _some_loss(self) -> Self:
        if not (self.dist_ratio or self.angle_ratio or self.triplet_ratio):
            raise ValueError("all of --dist-ratio, --angle-ratio and --triplet-ratio are 0: nothing to learn from")
        return self

    @model_validator(mode="after")
    def _teacher_survives(self) -> Self:
        if self.teacher_load.parent == self.save_dir:
            raise ValueError(f"--save-dir {self.save_dir}: holds the teacher {self.teacher_load}: choose another")
        return self


class EvaluateSettings(_Settings):
    """``rkd evaluate``. What is not given is read from the checkpoint."""

    dataset: Dataset | None = _flag(None, "Data", "The images; without it, the set the model was trained on.")
    data: File = _flag(Path("data"), "Data", "Where the images are; for folder, the folder of class folders itself.")
    resize: Count | None = _flag(None, "Data", "Resize to this side first; without it, as in training.")
    image_size: Count | None = _flag(None, "Data", "Crop to this side; without it, as in training.")
    workers: Annotated[int, Field(ge=0)] | None = _flag(None, "Data", "Processes that decode images; 0: none beside.")
    batch: Count = _flag(128, "Data", "Images a batch; changes speed and memory alone.")

    base: Base | None = _flag(None, "Model", "Only to make sure: an error where the checkpoint has another.")
    embedding_size: Count | None = _flag(None, "Model", "Only to make sure, likewise.")
    l2normalize: bool | None = _flag(None, "Model", "Only to make sure, likewise.")

    device: Device = _flag("auto", "Run", "auto, cpu, cuda or cuda:N.")
    precision: Literal["auto", "fp32", "tf32", "bf16"] = _flag("auto", "Run", "Of the network.")
    recall: Ks = _flag((1, 2, 4, 8), "Run", "The K of Recall@K.")


class DemoSettings(_Settings):
    """``rkd demo``."""

    data: File = _flag(Path("data"), "Data", "Where the drawn images go (in a folder of their own).")
    workers: Annotated[int, Field(ge=0)] | None = _flag(None, "Data", "Processes that decode images; 0: none beside.")
    seed: Annotated[int, Field(ge=0)] = _flag(1, "Run", "Seed of all three trainings; the images never change.")
    save_dir: File = _flag(Path("demo"), "Run", "Directory for the three runs.")
    overwrite: Overwrite = False
    device: Device = _flag("auto", "Run", "auto, cpu, cuda or cuda:N.")


class DownloadSettings(_Settings):
    """``rkd download-cub``. No ``--url`` means the official archive."""

    data: File = _flag(Path("data"), "Data", "Directory to put CUB_200_2011 into.")
    archive: File | None = _flag(None, "Source", "A CUB_200_2011.tgz you already have; no network is used.")
    url: str | None = _flag(None, "Source", "A mirror of the official archive.")
    md5: Annotated[str, Field(pattern=r"^([0-9a-f]{32}|none)$")] | None = _flag(
        None, "Source", "md5 the download must have, or none; without it, the official one."
    )


Model = TypeVar("Model", bound=_Settings)


def resolve(model: type[Model], flags: Mapping[str, object], config: Path | None = None) -> Model:
    """Settings from a configuration file and the flags above it.

    Args:
        model: which settings.
        flags: field names to what the command line gave: text, or a bool. Only what was given.
        config: a TOML or JSON file of field names to values.
    Raises:
        SettingsError: one line for each value that is wrong.
    """
    values = read_config(config) if config else {}
    wrong: dict[str, str] = {}
    for name, text in flags.items():
        try:
            values[name] = _parse(model, name, text)
        except ValidationError as error:
            wrong[name] = _message(error.errors()[0])
            values.pop(name, None)
    try:
        settings = model(**values)
    except ValidationError as error:
        for problem in error.errors():
            name = str(problem["loc"][0]) if problem["loc"] else ""
            wrong.setdefault(name, _message(problem))
    if wrong:
        raise SettingsError(*(_line(model, name, message, flags, config) for name, message in wrong.items()))
    return settings


def read_config(path: Path) -> dict[str, Any]:
    """The values of a TOML or JSON file.

    Raises:
        SettingsError: it is absent, cannot be parsed, or holds no table.
    """
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise SettingsError(f"--config {path}: cannot be read ({error.strerror})") from None
    except ValueError as error:  # what json, tomllib and the decoder raise
        kind = "JSON" if path.suffix == ".json" else "TOML"
        raise SettingsError(f"--config {path}: not {kind} ({error})") from None
    if not isinstance(values, dict):
        raise SettingsError(f"--config {path}: must hold one object of settings")
    return values


def _parse(model: type[_Settings], name: str, text: object) -> object:
    if not isinstance(text, str):
        return text
    adapter: TypeAdapter[object] = TypeAdapter(model.model_fields[name].rebuild_annotation())
    return adapter.validate_strings(text)


def panel_of(field: FieldInfo) -> str:
    """The group of flags in ``--help`` that a field belongs to."""
    assert isinstance(field.json_schema_extra, dict)
    return str(field.json_schema_extra["panel"])


def flag_name(field: str) -> str:
    """``num_image_per_class`` -> ``--num-image-per-class``."""
    return "--" + field.replace("_", "-")


def _line(model: type[_Settings], name: str, message: str, flags: Mapping[str, object], config: Path | None) -> str:
    if not name:
        return message
    if name not in model.model_fields:
        close = difflib.get_close_matches(name, model.model_fields, 1)
        return f"{config}: unknown key {name}" + (f": do you mean {close[0]}?" if close else "")
    return f"{flag_name(name)}: {message}" if name in flags or not config else f"{config}: {name} {message}"


def _message(problem: Any) -> str:
    kind, given, context = problem["type"], problem["input"], problem.get("ctx", {})
    if kind == "missing":
        return "is required"
    says = {
        "greater_than_equal": "must be at least {ge}",
        "greater_than": "must be above {gt}",
        "less_than_equal": "must be at most {le}",
        "literal_error": "must be one of {expected}",
        "int_parsing": "must be a whole number",
        "int_type": "must be a whole number",
        "int_from_float": "must be a whole number",
        "float_parsing": "must be a number",
        "float_type": "must be a number",
        "finite_number": "must be a finite number",
        "bool_parsing": "must be true or false",
        "bool_type": "must be true or false",
        "value_error": "{error}",
    }.get(kind, problem["msg"].replace("{", "(").replace("}", ")"))
    text = says.format(**context).replace("'", "")
    return text if kind == "value_error" else f"{text}, got {given}"
