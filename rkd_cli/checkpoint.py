"""Model files: safetensors that describe themselves, and the one way any file of a run reaches the disk."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rkd_cli import __version__
from rkd_cli.errors import CheckpointError, RunError

_KEY = "rkd"
Floats3 = Annotated[tuple[float, float, float], BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)]


class Header(BaseModel):
    """What a model file says of itself, as JSON under ``rkd`` in the safetensors metadata."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    format: Literal[1] = 1
    base: str
    embedding_size: int = Field(ge=1, le=65536)
    l2normalize: bool
    resize: int = Field(ge=1)
    image_size: int = Field(ge=1)
    mean: Floats3
    std: Floats3
    bgr255: bool = False
    input_size: int | None = None
    dataset: str
    epoch: int = Field(ge=0)
    train_recall: dict[str, float]
    eval_recall: dict[str, float]
    version: str = __version__


def save_model(path: Path, tensors: Mapping[str, Tensor], header: Header) -> None:
    """Write a model file; a reader sees the old one or the new one, never a half.

    Raises:
        RunError: the disk is full, or the folder read-only or gone.
    """
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {_KEY: header.model_dump_json()}  # one key: safetensors would write several in random order
    replace_file(path, lambda partial: save_file(state, partial, metadata=metadata))


def read_header(path: Path) -> Header:
    """
    Raises:
        CheckpointError: the file is absent, no safetensors file, or not one of this program.
    """
    text = _describes_itself(path)
    try:
        return Header.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise CheckpointError(f"{path}: its header is damaged or of a newer rkd ({where}: {first['msg']})") from None


def read_tensors(path: Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a model file, after every name, shape and type was found to be the expected one.

    Raises:
        CheckpointError: the file cannot be read, or its tensors are not those that its header promises.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            if names != set(expected):
                odd = sorted(names ^ set(expected))
                raise CheckpointError(f"{path}: {len(odd)} tensors missing or unknown ({odd[0]}): the file is damaged")
            for name, tensor in expected.items():
                if tuple(file.get_slice(name).get_shape()) != tuple(tensor.shape):
                    raise CheckpointError(f"{path}: {name} is not of the shape {tuple(tensor.shape)} that is due")
            state: dict[str, Tensor] = {name: file.get_tensor(name) for name in expected}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None
    for name, tensor in expected.items():
        if state[name].dtype != tensor.dtype:
            raise CheckpointError(f"{path}: {name} holds {state[name].dtype}, {tensor.dtype} is due")
    return state


def _describes_itself(path: Path) -> str:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file: a run writes best.safetensors and last.safetensors")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a safetensors file, or a damaged one ({error})") from None
    if _KEY not in metadata:
        raise CheckpointError(
            f"{path}: a safetensors file, but no checkpoint of rkd: its metadata do not describe a model"
        )
    return str(metadata[_KEY])


def write_text(path: Path, text: str) -> None:
    """Put a text file in place, whole or not at all.

    Raises:
        RunError: the disk is full, or the folder read-only or gone.
    """
    replace_file(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: object) -> None:
    """``write_text`` of indented JSON.

    Raises:
        RunError: the disk is full, or the folder read-only or gone.
    """
    write_text(path, json.dumps(value, indent=2) + "\n")


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write aside, flush to the disk, rename into place.

    Raises:
        RunError: the disk is full, or the folder read-only or gone.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise RunError(f"{path}: cannot be written ({reason}): what stood there before is whole") from None
