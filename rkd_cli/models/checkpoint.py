"""Checkpoints: safetensors files with a header that describes the network."""

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
    """Write a checkpoint atomically."""
    save_described(path, tensors, header)


def read_header(path: Path) -> Header:
    """Read the header of a checkpoint."""
    return read_description(path, Header)


def untrained_notes(who: str, header: Header, path: Path) -> list[str]:
    """A note if the checkpoint ``path`` is from epoch 0, before training; none for imported checkpoints."""
    if header.epoch or header.select_on is None:
        return []
    if path.with_name("settings.json").is_file() and not path.with_name("result.json").is_file():
        return [
            f"{who} is from epoch 0, before training: its run has not finished, and no later epoch was better so far"
        ]
    return [f"{who} is from epoch 0, before training: no epoch of its run was better"]


def save_described(path: Path, tensors: Mapping[str, Tensor], description: BaseModel) -> None:
    """Write tensors and their description, with a checksum of both, atomically."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    facts = json.loads(description.model_dump_json())
    text = json.dumps(facts | {"checksum": checksum(facts, state)})
    # one key, because safetensors writes several in random order
    replace_file(path, lambda partial: save_file(state, partial, metadata={_KEY: text}))


def read_description(path: Path, model: type[Described]) -> Described:
    """Read and validate the description in a file."""
    facts = _facts(path)
    facts.pop("checksum", None)
    if model is Header and _fits(facts, Position):
        best = path.with_name("best.safetensors")
        raise CheckpointError(f"{path}: is the resume state of a run, not a checkpoint. Use {best}.")
    return validated(path, facts, model)


def validated(path: Path, facts: object, model: type[Described]) -> Described:
    """The description in the header of a file."""
    try:
        return model.model_validate_json(json.dumps(facts))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole header"
        raise CheckpointError(f"{path}: the header is damaged or from a newer rkd ({where}: {first['msg']})") from None


def _fits(facts: dict[str, Any], model: type[BaseModel]) -> bool:
    try:
        model.model_validate_json(json.dumps(facts))
    except ValidationError:
        return False
    return True


def read_checksum(path: Path) -> str:
    """The checksum stored in a file."""
    return str(_facts(path).get("checksum"))


def read_tensors(path: Path, expected: Mapping[str, Tensor], others: str | None = None) -> dict[str, Tensor]:
    """Read the tensors of a file and check names, shapes and dtypes against ``expected``, then the checksum.

    Tensors whose names start with ``others`` may be present too.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            surplus = {name for name in names - expected.keys() if others is None or not name.startswith(others)}
            odd = sorted(surplus | (expected.keys() - names))
            if odd:
                raise CheckpointError(f"{path}: damaged ({len(odd)} tensors missing or unknown, first {odd[0]})")
            for name, tensor in expected.items():
                slice_ = file.get_slice(name)
                if tuple(slice_.get_shape()) != tuple(tensor.shape):
                    found, due = tuple(slice_.get_shape()), tuple(tensor.shape)
                    raise CheckpointError(f"{path}: damaged ({name} has shape {found}, expected {due})")
                if slice_.get_dtype() != _DTYPES[tensor.dtype]:
                    kind, due_kind = slice_.get_dtype(), _DTYPES[tensor.dtype]
                    raise CheckpointError(f"{path}: damaged ({name} has dtype {kind}, expected {due_kind})")
            state: dict[str, Tensor] = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None
    facts = _facts(path)
    if facts.pop("checksum", None) != checksum(facts, state):
        raise CheckpointError(f"{path}: damaged (wrong checksum). Download or create the file again.")
    return state


def _facts(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file. A run writes best.safetensors and last.safetensors.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a safetensors file, or damaged ({error})") from None
    if _KEY not in metadata:
        raise CheckpointError(f"{path}: not a checkpoint of rkd (its metadata contains no header)")
    return parsed(path, metadata[_KEY])


def parsed(path: Path, text: str) -> dict[str, Any]:
    """The JSON object in the header of a file."""
    try:
        facts = json.loads(text)
    except (ValueError, RecursionError):
        facts = None
    if not isinstance(facts, dict):
        raise CheckpointError(f"{path}: the header is damaged (not a JSON object)")
    return facts


def checksum(facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """CRC-32 of facts (JSON) and contiguous CPU tensors: detects damage, not manipulation."""
    value = zlib.crc32(json.dumps(facts, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        value = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), value)
        value = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, value)
    return f"{value:08x}"
