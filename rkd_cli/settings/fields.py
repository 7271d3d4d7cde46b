"""Types of the values of flags, and the flags that several commands share. Imported as ``f``."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, Strict

from rkd_cli.schemas import BASE, MAX_EMBEDDING, MAX_SIDE

Dataset = Literal[
    "cub200", "cars196", "sop", "inshop", "market1501", "msmt17", "veri776", "folder", "images", "list", "packed",
    "demo",
]  # fmt: skip
AnyDataset = Literal["auto", Dataset]
Precision = Literal["auto", "fp32", "tf32", "bf16"]
Cache = Literal["auto", "none", "disk", "device"]


class Settings(BaseModel):
    """Base of the settings of all commands."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", defer_build=True)


def _split(value: object) -> object:
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return tuple(value) if isinstance(value, list) else value


def _ascending(values: tuple[int, ...]) -> tuple[int, ...]:
    if list(values) != sorted(set(values)):
        raise ValueError(f"must be in ascending order, got {','.join(map(str, values))}")
    return values


def _some_once(values: tuple[str, ...]) -> tuple[str, ...]:
    if not values:
        raise ValueError("must name at least one, got nothing")
    return tuple(dict.fromkeys(values))


def _with_one(values: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted({1, *values}))


def _matching(pattern: str, form: str, value: str) -> str:
    if not re.fullmatch(pattern, value):
        raise ValueError(f"must be {form}, got {value}")
    return value


def _fold(value: str) -> str:
    part, _, count = value.partition("/")
    if not re.fullmatch(r"\d{1,4}/\d{1,4}", value) or int(count) < 2 or not 1 <= int(part) <= int(count):
        raise ValueError(f"must be I/N, as 1/3, with N of 2 or more and I from 1 to N, got {value}")
    return value


def _not_empty(value: object) -> object:
    if value == "":
        raise ValueError("must name a file or folder, got nothing")
    return value


def _teachers(value: object) -> object:
    """Several teachers as one text, separated by commas; a file may have commas in its name."""
    if isinstance(value, str) and "," in value and not Path(value).exists():
        value = [part.strip() for part in value.split(",") if part.strip()]
    if isinstance(value, list | tuple) and all(isinstance(part, str) for part in value):
        if twice := [part for part in value if value.count(part) > 1]:
            raise ValueError(f"{twice[0]} is given twice. Omit one")
        return ",".join(value)
    return value


Count = Annotated[int, Field(ge=1, le=10**9)]
Batch = Annotated[int, Field(ge=2, le=10**6)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Workers = Annotated[int, Field(ge=0, le=256)]  # processes
Side = Annotated[int, Field(ge=1, le=MAX_SIDE)]  # pixels
Size = Annotated[int, Field(ge=1, le=MAX_EMBEDDING)]
Ratio = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, le=1e30, allow_inf_nan=False)]
Cosine = Annotated[float, Field(ge=-1, le=1)]
Epochs = Annotated[tuple[Count, ...], BeforeValidator(_split), AfterValidator(_ascending)]
Sizes = Annotated[tuple[Size, ...], BeforeValidator(_split), AfterValidator(_ascending)]
Ks = Annotated[tuple[Count, ...], BeforeValidator(_split), AfterValidator(_with_one)]
Storages = Annotated[
    tuple[Literal["float", "int8", "binary"], ...], BeforeValidator(_split), AfterValidator(_some_once)
]
Fold = Annotated[str, AfterValidator(_fold)]
Figure = Annotated[
    str,
    AfterValidator(partial(_matching, r"recall@[1-9]\d{0,8}|map@r|r-precision", "recall@K, map@r or r-precision")),
]
Loggers = Annotated[tuple[Literal["csv", "tensorboard", "wandb", "mlflow"], ...], BeforeValidator(_split)]
File = Annotated[Path, Strict(False), BeforeValidator(_not_empty)]
Teachers = Annotated[str, BeforeValidator(_not_empty), BeforeValidator(_teachers)]
Base = Annotated[str, AfterValidator(partial(_matching, BASE, "the name of a network"))]
Device = Annotated[str, AfterValidator(partial(_matching, r"auto|cpu|cuda(:\d{1,3})?", "auto, cpu, cuda or cuda:N"))]
Md5 = Annotated[str, AfterValidator(partial(_matching, r"[0-9a-f]{32}|none", "32 hex digits or none"))]


def shared(panel: str, help: str, **more: Any) -> Any:
    """A flag, for an annotation: each command that has it sets its own default, or none if it is required."""
    return Field(description=help, json_schema_extra={"panel": panel}, **more)


def _flag(panel: str, default: Any, help: str, **more: Any) -> Any:
    return Field(default, description=help, json_schema_extra={"panel": panel}, **more)


# flags in a panel of --help: f.data(default, help)
data = partial(_flag, "Data")
source = partial(_flag, "Source")
model = partial(_flag, "Model")
measure = partial(_flag, "Measure")
loss = partial(_flag, "Loss")
distill = partial(_flag, "Distillation")
space = partial(_flag, "Teacher's space")
optim = partial(_flag, "Optimization")
run = partial(_flag, "Run")

DatasetName = Annotated[
    AnyDataset,
    shared(
        "Data",
        "Data set: auto is what --data holds, folder is one folder per class, images has no classes.",
    ),
]
DataFolder = Annotated[
    File,
    shared(
        "Data",
        "Folder of images, list (.csv), archive (.tar, .zip) or hf:ORG/NAME.",
    ),
]
MaxPixels = Annotated[
    int,
    Field(ge=1, le=2**31 - 1),
    shared("Data", "Largest image to decode, in pixels (width times height). A larger one is an error."),
]
DecodeWorkers = Annotated[
    Workers | None, shared("Data", "Number of processes that decode images. 0: decode in the main process.")
]
ReadCache = Annotated[Cache, shared("Data", "Cache for decoded images. auto: read an existing file, write none.")]
ReadCacheFolder = Annotated[
    File | None, shared("Data", "Folder of the file of decoded images. Default: the user's cache folder.")
]
SkipDamaged = Annotated[bool, shared("Data", "Leave out damaged images. Decodes all images first.")]
ReadBatch = Annotated[Count, shared("Data", "Number of images in a batch. Changes only speed and memory.")]
Recalls = Annotated[Ks, shared("Measure", "Values of K for Recall@K.")]
DeviceName = Annotated[Device, shared("Run", "Device: auto, cpu, cuda or cuda:N.")]
OverwriteOut = Annotated[bool, shared("Run", "Overwrite an existing --out file.")]

# excluded from settings.json, because they are not properties of the run
Overwrite = Annotated[bool, shared("Run", "Overwrite an existing run in --save-dir.", exclude=True)]
Processes = Annotated[
    int,
    shared(
        "Run",
        "Number of processes on this machine, one per GPU (torchrun works too). Losses use the whole batch; batch norm "
        "uses the images of each process.",
        ge=1,
        le=256,
        exclude=True,
    ),
]
