"""The resume state ``state.safetensors``: a run's position, weights and optimizer state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from rkd_cli.errors import CheckpointError
from rkd_cli.models.checkpoint import read_description, read_tensors, save_described
from rkd_cli.schemas import Position

_MODEL, _OPTIMIZER = "model.", "optimizer."  # prefixes of tensor names
_REMEDY = "Restore the file, or start again with --overwrite."


def save_state(path: Path, position: Position, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write the resume state. Optimizer hyperparameters are in the settings, not here."""
    tensors = {_MODEL + name: tensor for name, tensor in model.state_dict().items()}
    if optimizer.state:  # without any, torch would take a step to create it
        states: Any = get_optimizer_state_dict(model, optimizer)["state"]
        tensors |= {
            f"{_OPTIMIZER}{name}.{key}": value
            for name, state in states.items()
            for key, value in state.items()
            if isinstance(value, Tensor)
        }
    save_described(path, tensors, position)


def read_position(path: Path) -> Position:
    """The position of the run; a CheckpointError if the file is not a valid resume state."""
    return read_description(path, Position)


def restore(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load model and optimizer; a CheckpointError if the file is damaged or of another network."""
    expected = {_MODEL + name: tensor for name, tensor in model.state_dict().items()}
    found = read_tensors(path, expected, others=_OPTIMIZER)
    states: dict[str, Any] = {}
    for full in found.keys() - expected.keys():
        name, _, key = full.removeprefix(_OPTIMIZER).rpartition(".")
        states.setdefault(name, {})[key] = found[full]
    parameters = dict(model.named_parameters())
    if unknown := sorted(states.keys() - parameters.keys()):
        raise CheckpointError(f"{path}: has optimizer state of {unknown[0]}, which the network lacks. {_REMEDY}")
    for name, state in states.items():
        for key, value in state.items():  # fused optimizers would read out of bounds
            if value.shape not in ((), parameters[name].shape):
                raise CheckpointError(f"{path}: {key} of {name} does not have the shape of the weight. {_REMEDY}")
    model.load_state_dict({name.removeprefix(_MODEL): found[name] for name in expected})
    if not states:
        return
    names = {parameter: name for name, parameter in parameters.items()}
    groups: list[dict[str, Any]] = [
        group | {"params": [names[p] for p in group["params"]]} for group in optimizer.param_groups
    ]
    # not strict: a parameter without a gradient so far has no state
    options = StateDictOptions(strict=False)
    found_state: dict[str, Any] = {"state": states, "param_groups": groups}
    set_optimizer_state_dict(model, optimizer, found_state, options=options)
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            # fused optimizers need the state in the parameter's memory format
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                state[key] = torch.empty_like(parameter).copy_(value)
