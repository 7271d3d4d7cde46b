"""Model files: safetensors that describe themselves."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rkd_cli.errors import CheckpointError
from rkd_cli.runtime.files import replace_file
from rkd_cli.schemas import Header, Position

_KEY = "rkd"
_DTYPES = {
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
Described = TypeVar("Described", bound=BaseModel)


def save_model(path: Path, tensors: Mapping[str, Tensor], header: Header) -> None:
    """Write a model file; a reader sees the old one or the new one, never a half.

    Raises:
        RunError: the disk is full, or the folder read-only or gone.
    """
    save_described(path, tensors, header)


def read_header(path: Path) -> Header:
    """What a model file says of itself.

    Raises:
        CheckpointError: the file is absent, no safetensors file, or not one of this program.
    """
    return read_description(path, Header)


def untrained_notes(who: str, header: Header) -> list[str]:
    """That a run saved a network before it trained it. An imported one, picked by no split, does not say.

    Args:
        who: the network.
        header: what its file says.
    """
    if header.epoch or header.select_on is None:
        return []
    return [f"{who} is of epoch 0, the network before training: no epoch of its run has been better"]


def save_described(path: Path, tensors: Mapping[str, Tensor], description: BaseModel) -> None:
    """Write tensors and what describes them, with a checksum of both.

    Raises:
        RunError: the disk is full, or the folder read-only or gone.
    """
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    facts = json.loads(description.model_dump_json())
    text = json.dumps(facts | {"checksum": checksum(facts, state)})
    # one key: safetensors would write several in random order
    replace_file(path, lambda partial: save_file(state, partial, metadata={_KEY: text}))


def read_description(path: Path, model: type[Described]) -> Described:
    """How a file of this program describes itself, every field checked.

    Raises:
        CheckpointError: the file is absent, no safetensors file, not one of this program, or a field of its description
            is missing, unknown, or out of its bounds.
    """
    facts = _facts(path)
    facts.pop("checksum", None)
    try:
        return model.model_validate_json(json.dumps(facts))
    except ValidationError as error:
        if model is Header and _fits(facts, Position):
            best = path.with_name("best.safetensors")
            raise CheckpointError(f"{path}: is the state of a run, for --resume, and no model: name {best}") from None
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise CheckpointError(f"{path}: its header is damaged or of a newer rkd ({where}: {first['msg']})") from None


def _fits(facts: dict[str, Any], model: type[BaseModel]) -> bool:
    try:
        model.model_validate_json(json.dumps(facts))
    except ValidationError:
        return False
    return True


def read_checksum(path: Path) -> str:
    """What a file says that the checksum of its contents is.

    Raises:
        CheckpointError: the file is absent, damaged, or not one of this program.
    """
    return str(_facts(path).get("checksum"))


def read_tensors(path: Path, expected: Mapping[str, Tensor], others: str | None = None) -> dict[str, Tensor]:
    """The tensors of a file, after every name, shape and type was found to be the expected one.

    Args:
        path: of the file.
        expected: tensors of the names, shapes and types that must be there.
        others: how the names begin of tensors that may be there too.
    Raises:
        CheckpointError: the file cannot be read, or its tensors are not those that its header promises.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            surplus = {name for name in names - expected.keys() if others is None or not name.startswith(others)}
            odd = sorted(surplus | (expected.keys() - names))
            if odd:
                raise CheckpointError(f"{path}: {len(odd)} tensors missing or unknown ({odd[0]}): the file is damaged")
            for name, tensor in expected.items():
                slice_ = file.get_slice(name)
                if tuple(slice_.get_shape()) != tuple(tensor.shape):
                    raise CheckpointError(f"{path}: {name} is not of the shape {tuple(tensor.shape)} that is due")
                if slice_.get_dtype() != _DTYPES[tensor.dtype]:
                    raise CheckpointError(f"{path}: {name} holds {slice_.get_dtype()}, {_DTYPES[tensor.dtype]} is due")
            state: dict[str, Tensor] = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None
    facts = _facts(path)
    if facts.pop("checksum", None) != checksum(facts, state):
        raise CheckpointError(f"{path}: its checksum is wrong: the file is damaged, fetch or make it again")
    return state


def _facts(path: Path) -> dict[str, Any]:
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
    try:
        facts = json.loads(metadata[_KEY])
    except (ValueError, RecursionError):
        facts = None
    if not isinstance(facts, dict):
        raise CheckpointError(f"{path}: its header is damaged: it is no JSON object")
    return facts


def checksum(facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Of facts (JSON) and of tensors on the CPU without gaps: against damage, not against malice."""
    value = zlib.crc32(json.dumps(facts, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        value = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), value)
        value = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, value)
    return f"{value:08x}"
