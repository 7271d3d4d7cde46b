"""The resume state of a run is restored bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rkd_cli.errors import CheckpointError
from rkd_cli.models import EmbeddingNet
from rkd_cli.models.checkpoint import read_tensors, save_described
from rkd_cli.schemas import EpochDone, Position
from rkd_cli.training.state import read_position, restore, save_state

Parameters = Iterator[nn.Parameter]
OPTIMIZERS: dict[str, Callable[[Parameters], torch.optim.Optimizer]] = {
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.1, weight_decay=0.01),
    "fused adam": lambda parameters: torch.optim.Adam(parameters, lr=0.1, weight_decay=0.01, fused=True),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, amsgrad=True),
    "fused adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.5, fused=True),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01),
    "plain": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
}


class Base(nn.Module):
    """Two convolutions with a batch norm between them, and a layer that is used only where asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3)
        self.spare, self.with_spare = nn.Linear(6, 6), False

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, 6)."""
        features: Tensor = self.second(self.norm(self.first(images)).relu()).mean(dim=(2, 3))
        return features + self.spare(features) if self.with_spare else features


def network(seed: int, memory_format: torch.memory_format = torch.channels_last) -> EmbeddingNet:
    torch.manual_seed(seed)
    model = EmbeddingNet(Base(), 6, 5, l2normalize=True)
    model.to(memory_format=memory_format)
    return model


def learn(model: EmbeddingNet, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        images = torch.rand(8, 3, 9, 9, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(images.contiguous(memory_format=torch.channels_last)).pow(3).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def tensors_of(model: EmbeddingNet, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights and everything that the optimizer knows of them."""
    found = dict(model.state_dict())
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                found[f"{name} {key}"] = value
    return found


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_next_steps_are_those_of_a_run_that_was_not_stopped(
    kind: str, memory_format: torch.memory_format, tmp_path: Path
) -> None:
    """The spare layer has no gradient until the state is restored: its first step must still be its first."""
    model = network(1, memory_format)
    optimizer = OPTIMIZERS[kind](model.parameters())
    learn(model, optimizer, range(3))
    save_state(tmp_path / "state.safetensors", Position(epoch=1, step=3), model, optimizer)

    again = network(2, memory_format)
    its_optimizer = OPTIMIZERS[kind](again.parameters())
    restore(tmp_path / "state.safetensors", again, its_optimizer)
    assert_equal(tensors_of(again, its_optimizer), tensors_of(model, optimizer))
    for steps, with_spare in ((range(3, 5), False), (range(5, 8), True)):
        for net, its in ((model, optimizer), (again, its_optimizer)):
            assert isinstance(net.base, Base)
            net.base.with_spare = with_spare
            learn(net, its, steps)
        assert_equal(tensors_of(again, its_optimizer), tensors_of(model, optimizer))
    assert not torch.equal(model.state_dict()["base.spare.weight"], network(1).state_dict()["base.spare.weight"])


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_restored_memories_are_laid_out_as_their_parameters(kind: str, tmp_path: Path) -> None:
    model = network(1)
    optimizer = OPTIMIZERS[kind](model.parameters())
    learn(model, optimizer, range(2))
    save_state(tmp_path / "state.safetensors", Position(epoch=1, step=2), model, optimizer)
    again = network(2)
    its_optimizer = OPTIMIZERS[kind](again.parameters())
    restore(tmp_path / "state.safetensors", again, its_optimizer)
    convolution = again.get_parameter("base.second.weight")
    assert convolution.stride() != convolution.contiguous().stride()
    memories = [value for value in its_optimizer.state.get(convolution, {}).values() if value is not None]
    shaped = [value for value in memories if value.shape == convolution.shape]
    assert all(value.stride() == convolution.stride() for value in shaped)
    assert len(shaped) == {"adam": 2, "fused adam": 2, "adamw": 3, "fused adamw": 2, "momentum": 1, "plain": 0}[kind]


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_saving_changes_nothing(kind: str, tmp_path: Path) -> None:
    """Before the first step there is nothing of the optimizer to be saved, and none is taken to have something."""
    model = network(1)
    optimizer = OPTIMIZERS[kind](model.parameters())
    for steps in (range(0), range(2)):
        learn(model, optimizer, steps)
        before = copy.deepcopy(tensors_of(model, optimizer))
        groups = copy.deepcopy([{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups])
        save_state(tmp_path / "state.safetensors", Position(epoch=1), model, optimizer)
        assert_equal(tensors_of(model, optimizer), before)
        assert [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups] == groups


def test_a_state_before_the_first_step_comes_back(tmp_path: Path) -> None:
    model, again = network(1), network(2)
    save_state(tmp_path / "state.safetensors", Position(), model, OPTIMIZERS["fused adam"](model.parameters()))
    optimizer = OPTIMIZERS["fused adam"](again.parameters())
    restore(tmp_path / "state.safetensors", again, optimizer)
    assert_equal(dict(again.state_dict()), dict(model.state_dict()))
    assert not optimizer.state


def test_restoring_keeps_the_groups_as_the_settings_made_them(tmp_path: Path) -> None:
    """More epochs may be asked for, never another rate; but what the groups hold is the settings' alone."""
    model, again = network(1), network(2)
    optimizer = OPTIMIZERS["fused adam"](model.parameters())
    learn(model, optimizer, range(2))
    save_state(tmp_path / "state.safetensors", Position(epoch=1), model, optimizer)
    other = torch.optim.Adam(again.parameters(), lr=0.025, weight_decay=0.5, fused=True)
    restore(tmp_path / "state.safetensors", again, other)
    (group,) = other.param_groups
    assert (group["lr"], group["weight_decay"], group["fused"]) == (0.025, 0.5, True)
    assert [id(p) for p in group["params"]] == [id(p) for p in again.parameters()]


def test_a_position_comes_back(tmp_path: Path) -> None:
    row = EpochDone(
        epoch=0, figures={"eval": {"R@1": 0.5, "R@10": 1.0}}, losses={"dist": 1 / 3}, seconds=2.5, is_best=True
    )
    position = Position(
        epoch=1, step=7, sums={"dist": 0.1 + 0.2}, epoch_seconds=3.25, seconds=9.5, rows=(row,),
        figures={"train": {"R@1": 0.25}, "eval": {"R@1": 0.75}}, inputs={"images": "abc"},
    )  # fmt: skip
    model = network(1)
    save_state(tmp_path / "state.safetensors", position, model, OPTIMIZERS["adam"](model.parameters()))
    assert read_position(tmp_path / "state.safetensors") == position


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = network(1)
    optimizer = OPTIMIZERS["fused adam"](model.parameters())
    learn(model, optimizer, range(2))
    save_state(tmp_path / "state.safetensors", Position(epoch=1), model, optimizer)
    return tmp_path / "state.safetensors"


def with_tensors(path: Path, more: dict[str, Tensor]) -> None:
    """The same file, with tensors added or replaced, and with a checksum that is right."""
    model = network(1)
    expected = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    save_described(path, read_tensors(path, expected, others="optimizer.") | more, read_position(path))


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"optimizer.base.third.weight.exp_avg": torch.zeros(2)}, "optimizer state of base.third.weight"),
        ({"optimizer.base.third.weight": torch.zeros(2)}, "optimizer state of base.third"),
        ({"optimizer.odd": torch.zeros(2)}, "optimizer state of"),
        ({"optimizer.linear.bias.exp_avg": torch.zeros(9)}, r"exp_avg of linear\.bias does not have"),
        ({"model.linear.bias": torch.zeros(9)}, r"model\.linear\.bias has shape"),
        ({"model.base.third.weight": torch.zeros(2)}, "1 tensors missing or unknown"),
        ({"surprise": torch.zeros(2)}, r"1 tensors missing or unknown, first surprise"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_the_network_does_not_have_is_one_line(saved: Path, more: dict[str, Tensor], says: str) -> None:
    with_tensors(saved, more)
    model = network(2)
    optimizer = OPTIMIZERS["fused adam"](model.parameters())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError, match=says) as caught:
        restore(saved, model, optimizer)
    assert str(caught.value).startswith(str(saved))
    assert "\n" not in str(caught.value)
    assert_equal(dict(model.state_dict()), dict(before))
    assert not optimizer.state


def test_a_state_of_another_network_is_one_line(saved: Path) -> None:
    model = EmbeddingNet(nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1)), 4, 5, l2normalize=True)
    with pytest.raises(CheckpointError, match=r"tensors missing or unknown, first model\.base") as caught:
        restore(saved, model, OPTIMIZERS["fused adam"](model.parameters()))
    assert "\n" not in str(caught.value)
