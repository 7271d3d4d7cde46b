"""``state.safetensors``: where a run stands, with the weights and the optimizer's state to go on from there."""

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

_MODEL, _OPTIMIZER = "model.", "optimizer."  # how the names of tensors begin


def save_state(path: Path, position: Position, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write the state of a run. What the optimizer's groups hold, the settings tell.

    Raises:
        RunError: the disk is full, or the folder read-only or gone.
    """
    tensors = {_MODEL + name: tensor for name, tensor in model.state_dict().items()}
    if optimizer.state:  # asked before its first step, torch would take one to have something to give
        states: Any = get_optimizer_state_dict(model, optimizer)["state"]
        tensors |= {
            f"{_OPTIMIZER}{name}.{key}": value
            for name, state in states.items()
            for key, value in state.items()
            if isinstance(value, Tensor)
        }
    save_described(path, tensors, position)


def read_position(path: Path) -> Position:
    """Where the run stands.

    Raises:
        CheckpointError: the file is absent, damaged, or no state of a run.
    """
    return read_description(path, Position)


def restore(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Give the model and the optimizer what they held when the state was saved.

    Raises:
        CheckpointError: the file is damaged, or of another network.
    """
    expected = {_MODEL + name: tensor for name, tensor in model.state_dict().items()}
    found = read_tensors(path, expected, others=_OPTIMIZER)
    states: dict[str, Any] = {}
    for full in found.keys() - expected.keys():
        name, _, key = full.removeprefix(_OPTIMIZER).rpartition(".")
        states.setdefault(name, {})[key] = found[full]
    parameters = dict(model.named_parameters())
    if strangers := sorted(states.keys() - parameters.keys()):
        raise CheckpointError(f"{path}: holds the optimizer's state of {strangers[0]}, which the network does not have")
    for name, state in states.items():
        for key, value in state.items():  # fused optimizers would read beyond the end of a smaller one
            if value.shape not in ((), parameters[name].shape):
                raise CheckpointError(f"{path}: the optimizer's {key} of {name} is not of the weight's shape")
    model.load_state_dict({name.removeprefix(_MODEL): found[name] for name in expected})
    if not states:
        return
    names = {parameter: name for name, parameter in parameters.items()}
    groups: list[dict[str, Any]] = [
        group | {"params": [names[p] for p in group["params"]]} for group in optimizer.param_groups
    ]
    # a parameter that has had no gradient yet has no state: not strict
    options = StateDictOptions(strict=False)
    found_state: dict[str, Any] = {"state": states, "param_groups": groups}
    set_optimizer_state_dict(model, optimizer, found_state, options=options)
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            # fused optimizers walk both memories alike, so the state takes the parameter's own memory format
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                state[key] = torch.empty_like(parameter).copy_(value)
