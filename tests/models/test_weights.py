"""Files of weights as people have them: wrapped, prefixed, with what training left beside."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from rkd_cli.errors import WeightsError
from rkd_cli.events import Event, Note
from rkd_cli.models.backbones import build_backbone
from rkd_cli.models.embedding_net import build_model
from rkd_cli.models.sources import open_network

State = dict[str, Tensor]
NAME = "shufflenet_v2_x0_5"


def state_of(seed: int) -> State:
    torch.manual_seed(seed)
    network: nn.Module = torchvision.models.get_model(NAME)
    return network.state_dict()


@pytest.fixture(scope="module")
def mine() -> State:
    return state_of(1)


@pytest.fixture(scope="module")
def other() -> State:
    return state_of(2)


def under(prefix: str, state: State) -> State:
    return {f"{prefix}{key}": value for key, value in state.items()}


def taken(file: Path, name: str = NAME) -> tuple[State, list[str]]:
    """The weights of the network that a file gives, and what is said of them."""
    said: list[Event] = []
    backbone = build_backbone(name, str(file), report=said.append)
    return backbone.network.state_dict(), [event.text for event in said if isinstance(event, Note)]


def same(found: State, expected: State) -> bool:
    return all(torch.equal(value, expected[key]) for key, value in found.items())


HEAD = {"head.mlp.0.weight": torch.ones(2, 2), "head.last.weight": torch.ones(1)}
OPTIMIZER = {"state": {0: {"step": 1}}, "param_groups": [{"lr": 0.1}]}
WRAPPED: dict[str, tuple[Callable[[State, State], Any], str | None]] = {
    "plain": (lambda mine, other: mine, None),
    "without its classifier": (lambda mine, other: {k: v for k, v in mine.items() if not k.startswith("fc.")}, None),
    "a classifier of another size": (lambda mine, other: mine | {"fc.weight": torch.ones(7, 1024)}, None),
    "state_dict": (
        lambda mine, other: {"state_dict": mine, "optimizer": OPTIMIZER, "epoch": 3},
        "loaded state_dict, ignored optimizer, epoch",
    ),
    "model beside args": (
        lambda mine, other: {"model": mine, "args": argparse.Namespace(lr=0.1, decay=[1, 2])},
        "loaded model, ignored args",
    ),
    **{
        key: (lambda mine, other, key=key: {key: mine}, f"loaded {key}")  # type: ignore[misc]
        for key in ("model", "teacher", "student", "ema", "model_ema", "state_dict_ema", "net", "network")
    },
    **{
        f"behind {prefix}": (lambda mine, other, prefix=prefix: under(prefix, mine), f"loaded {prefix}*")  # type: ignore[misc]
        for prefix in (
            "module.", "backbone.", "model.", "encoder.", "teacher.", "module.backbone.",
            "student.module.encoder.model.",
        )
    },
    "compiled": (lambda mine, other: under("_orig_mod.", mine), None),
    "compiled inside": (lambda mine, other: under("module._orig_mod.", mine), "loaded module.*"),
    "an average of torch": (
        lambda mine, other: {"n_averaged": torch.tensor(4)} | under("module.", mine),
        "loaded module.*, ignored n_averaged",
    ),
    "a projection head": (
        lambda mine, other: {"state_dict": under("module.backbone.", mine) | under("module.", HEAD)},
        "loaded state_dict module.backbone.*, ignored module.head.*",
    ),
    "a head on the network": (lambda mine, other: mine | HEAD, "loaded its tensors, ignored head.*"),
    "DINO": (
        lambda mine, other: {"student": under("module.backbone.", other), "teacher": under("backbone.", mine) | HEAD},
        "loaded teacher backbone.*, ignored student, head.*",
    ),
    "DINO, flat": (
        lambda mine, other: under("student.backbone.", other) | under("teacher.backbone.", mine),
        "loaded teacher.backbone.*, ignored student.*",
    ),
    "timm's average": (
        lambda mine, other: {"state_dict": other, "state_dict_ema": mine, "arch": "x"},
        "loaded state_dict_ema, ignored state_dict, arch",
    ),
    "MoCo": (
        lambda mine, other: {"state_dict": under("module.encoder_q.", mine) | under("module.encoder_k.", other)},
        "loaded state_dict module.encoder_q.*, ignored module.encoder_k.*",
    ),
    "a network of another kind beside": (
        lambda mine, other: {"teacher": {"conv1.weight": torch.ones(64, 3, 7, 7)}, "student": mine},
        "loaded student, ignored teacher",
    ),
    "twice the same": (
        lambda mine, other: {"state_dict": mine, "model": dict(mine)},
        "loaded state_dict, ignored model",
    ),
    "an old file": (lambda mine, other: {k: v for k, v in mine.items() if "num_batches" not in k}, None),
}  # fmt: skip


@pytest.mark.parametrize("how", WRAPPED)
def test_wrapped_weights_are_taken_out_and_the_note_says_which(
    mine: State, other: State, tmp_path: Path, how: str
) -> None:
    wrap, says = WRAPPED[how]
    torch.save(wrap(mine, other), tmp_path / "w.pth")
    found, notes = taken(tmp_path / "w.pth")
    assert same(found, mine)
    assert notes == ([] if says is None else [f"{tmp_path / 'w.pth'}: {says}"])


def test_safetensors_are_taken_out_of_prefixes_too(mine: State, other: State, tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    save_file(under("student.", other) | under("teacher.module.", mine), file)
    found, notes = taken(file)
    assert same(found, mine)
    assert notes == [f"{file}: loaded teacher.module.*, ignored student.*"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_float_type_become_float32(mine: State, tmp_path: Path, dtype: torch.dtype) -> None:
    file = tmp_path / "w.safetensors"
    save_file({key: value.to(dtype) if value.is_floating_point() else value for key, value in mine.items()}, file)
    found, notes = taken(file)
    assert notes == []
    assert {value.dtype for value in found.values()} == {torch.float32, torch.int64}
    assert all(torch.equal(value, mine[key].to(dtype).to(value.dtype)) for key, value in found.items())


def test_real_float16_weights_are_read() -> None:
    file = Path(__file__).resolve().parents[3] / "shared/data/weights/mobilenet_v2.safetensors"
    if not file.exists():
        pytest.skip(f"{file.name} is not beside this checkout")
    found, notes = taken(file, "mobilenet_v2")
    assert notes == []
    assert all(bool(value.isfinite().all()) for value in found.values())


@pytest.mark.parametrize(
    ("wrap", "says"),
    [
        (
            lambda mine, other: under("module.", {k: v for k, v in mine.items() if "stage4.3" not in k}),
            r"not the weights of a shufflenet_v2_x0_5: stage4.3.branch2.0.weight is missing \(and 14 more\) \(loaded m",
        ),
        (
            lambda mine, other: mine | {"stage4.9.weight": torch.ones(1)},
            r"not the weights of a shufflenet_v2_x0_5: stage4.9.weight is not one of its tensors$",
        ),
        (
            lambda mine, other: mine | {"conv1.0.weight": torch.ones(24, 3, 5, 5)},
            r"conv1.0.weight has shape \(24, 3, 5, 5\) in the file and \(24, 3, 3, 3\) in the network$",
        ),
        (
            lambda mine, other: mine | {"conv1.0.weight": torch.ones(24, 3, 3, 3, dtype=torch.int8)},
            r"conv1.0.weight has dtype torch.int8, not a floating one$",
        ),
        (
            lambda mine, other: {"blocks.0.weight": torch.ones(1)},
            r"contains none of its tensors, such as conv1.0.weight, only others, such as blocks.0.weight",
        ),
        (
            lambda mine, other: under("net_a.", mine) | under("net_b.", other),
            r"contains two networks that fit, net_a.\* and net_b.\*. Save one of them",
        ),
        (lambda mine, other: {"epoch": 3, "args": argparse.Namespace()}, "not a state dict"),
    ],
)
def test_weights_that_fit_in_part_are_refused_with_what_is_wrong(
    mine: State, other: State, tmp_path: Path, wrap: Callable[[State, State], Any], says: str
) -> None:
    torch.save(wrap(mine, other), tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=says) as caught:
        taken(tmp_path / "w.pth")
    assert len(str(caught.value).splitlines()) == 1


class Settings:
    """Of somebody's own program."""


@pytest.mark.parametrize("beside", [Path("a"), Settings(), argparse.Namespace(out=Path("a"))])
def test_what_cannot_be_read_without_running_code_is_one_plain_line(
    mine: State, tmp_path: Path, beside: object
) -> None:
    torch.save({"model": mine, "args": beside}, tmp_path / "w.pth")
    with pytest.raises(WeightsError) as caught:
        taken(tmp_path / "w.pth")
    text = str(caught.value)
    assert "\x1b" not in text and "\n" not in text
    assert "Settings" in text or "Path" in text
    assert text.endswith("save its tensors with torch.save(network.state_dict(), FILE).")


def test_a_whole_network_in_a_pickle_is_one_plain_line(tmp_path: Path) -> None:
    torch.save(torchvision.models.get_model(NAME), tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"contains a torchvision\.models\.shufflenetv2\.ShuffleNetV2, which") as e:
        taken(tmp_path / "w.pth")
    assert "\x1b" not in str(e.value)


def test_whoever_opens_a_network_is_told(mine: State, tmp_path: Path) -> None:
    torch.save({"model": mine}, tmp_path / "w.pth")
    said: list[Event] = []
    build_model(NAME, 8, False, str(tmp_path / "w.pth"), report=said.append)
    open_network(f"torchvision:{NAME}", tmp_path / "w.pth", report=said.append)
    assert said == [Note(f"{tmp_path / 'w.pth'}: loaded model")] * 2


@pytest.mark.parametrize("prefix", ["", "module.", "teacher.backbone."])
def test_wrapped_weights_of_timm(tmp_path: Path, prefix: str) -> None:
    timm = pytest.importorskip("timm")
    network: Any = timm.create_model("vit_tiny_patch16_224", num_classes=3, depth=1)
    expected = network.state_dict()
    torch.save({"model": under(prefix, expected)} if prefix else expected, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"timm:vit_tiny_patch16_224: blocks\.1\.norm1\.weight is missing"):
        taken(tmp_path / "w.pth", "timm:vit_tiny_patch16_224")
    network = timm.create_model("vit_tiny_patch16_224", num_classes=3)
    expected = network.state_dict()
    torch.save({"model": under(prefix, expected)} if prefix else expected, tmp_path / "w.pth")
    found, notes = taken(tmp_path / "w.pth", "timm:vit_tiny_patch16_224")
    assert same(found, expected)
    assert len(notes) == bool(prefix)
