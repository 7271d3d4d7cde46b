"""Where a run stands, with all that it takes to go on from there: ``state.safetensors``.

Batches, crops and every other draw are functions of the seed, the epoch and the step, so neither a sampler nor a random
generator has anything to be saved.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from rkd_cli.events import EpochDone, TeacherEvaluated
from rkd_cli.models import EmbeddingNet
from rkd_cli.models.checkpoint import read_description, read_tensors, save_described

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # what Adam keeps of each parameter


class Position(BaseModel):
    """A step boundary: ``step`` steps of ``epoch`` are done, and all epochs before it are evaluated and saved."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    format: Literal[1] = 1
    epoch: int = Field(default=0, ge=0)
    step: int = Field(default=0, ge=0)
    sums: dict[str, float] = {}  # of each loss term over these steps
    epoch_seconds: float = Field(default=0.0, ge=0, allow_inf_nan=False)  # spent on the epoch so far
    seconds: float = Field(default=0.0, ge=0, allow_inf_nan=False)  # spent on the run so far
    rows: tuple[EpochDone, ...] = ()
    teacher: TeacherEvaluated | None = None
    moments: tuple[int, ...] = ()  # positions of the parameters that Adam has met
    inputs: dict[str, str] = {}  # what the run reads, each with a digest


def save_state(path: Path, position: Position, model: EmbeddingNet, optimizer: torch.optim.Optimizer) -> None:
    """
    Raises:
        RunError: the disk is full, or the folder read-only or gone.
    """
    parameters = dict(enumerate(model.parameters()))
    met = tuple(index for index, parameter in parameters.items() if parameter in optimizer.state)
    tensors: dict[str, Tensor] = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for index in met:
        tensors |= {f"adam.{index}.{key}": optimizer.state[parameters[index]][key] for key in _MOMENTS}
    save_described(path, tensors, position.model_copy(update={"moments": met}))


def read_position(path: Path) -> Position:
    """
    Raises:
        CheckpointError: the file is absent, damaged, or no state of a run.
    """
    return read_description(path, Position)


def restore(path: Path, position: Position, model: EmbeddingNet, optimizer: torch.optim.Optimizer) -> None:
    """Give the model and the optimizer what they held at the position.

    Raises:
        CheckpointError: the file is damaged, or of another network.
    """
    parameters = dict(enumerate(model.parameters()))
    expected = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    met = [index for index in position.moments if index in parameters]
    for index in met:
        moments = (torch.zeros(()), parameters[index], parameters[index])
        expected |= {f"adam.{index}.{key}": tensor for key, tensor in zip(_MOMENTS, moments, strict=True)}
    found = read_tensors(path, expected)
    model.load_state_dict({name.removeprefix("model."): found[name] for name in found if name.startswith("model.")})
    for index in met:
        parameter = parameters[index]
        # in the parameter's own memory format, or later sums would round otherwise
        optimizer.state[parameter] = {
            "step": found[f"adam.{index}.step"].to(parameter.device),
            "exp_avg": torch.empty_like(parameter).copy_(found[f"adam.{index}.exp_avg"]),
            "exp_avg_sq": torch.empty_like(parameter).copy_(found[f"adam.{index}.exp_avg_sq"]),
        }
