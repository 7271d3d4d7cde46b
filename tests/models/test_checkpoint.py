"""Model files: what goes in comes out, and what is wrong is refused before it is trusted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rkd_cli.errors import CheckpointError, RunError
from rkd_cli.models import EmbeddingNet, build_model, checkpoint, load_model
from rkd_cli.models.checkpoint import read_header, save_model
from rkd_cli.runtime.files import replace_file, write_json
from rkd_cli.schemas import Header

HEADER = Header(
    base="resnet18",
    embedding_size=8,
    l2normalize=True,
    resize=72,
    image_size=64,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    dataset="demo",
    epoch=3,
    train_recall={1: 0.5},
    eval_recall={1: 0.25, 2: 0.5},
)


@pytest.fixture(scope="module")
def model() -> EmbeddingNet:
    return build_model("resnet18", 8, l2normalize=True).eval()


@pytest.fixture
def saved(tmp_path: Path, model: EmbeddingNet) -> Path:
    save_model(tmp_path / "m.safetensors", model.state_dict(), HEADER)
    return tmp_path / "m.safetensors"


def test_a_model_comes_back_from_its_file_alone(saved: Path, model: EmbeddingNet) -> None:
    loaded = load_model(saved)
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))
    assert read_header(saved) == HEADER
    assert not loaded.training
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


def test_a_model_normalizes_as_its_file_says(saved: Path) -> None:
    rewrite(saved, {"mean": [0.0, 0.0, 0.0], "std": [9.0, 9.0, 9.0], "bgr255": True, "input_size": 16})
    found = load_model(saved).normalization
    assert (found.mean, found.std, found.bgr255, found.input_size) == ((0.0,) * 3, (9.0,) * 3, True, 16)


def test_the_file_describes_itself_to_others(saved: Path) -> None:
    with safe_open(saved, framework="pt") as file:
        facts = json.loads(file.metadata()["rkd"])
    assert facts["base"] == "resnet18"
    assert facts["version"]
    assert facts["format"] == 1


def rewrite(path: Path, change: dict[str, object]) -> None:
    """Change header fields, and the tensors of ``TENSORS`` (None takes one away)."""
    header = json.loads(HEADER.model_dump_json()) | {k: v for k, v in change.items() if k not in TENSORS}
    tensors = {k: v for k, v in load_file(path).items() if k not in change}
    tensors |= {k: v for k, v in change.items() if k in TENSORS and isinstance(v, torch.Tensor)}
    header["checksum"] = checkpoint.checksum(header, tensors)
    save_file(tensors, path, metadata={"rkd": json.dumps(header)})


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(bytes(data))


TENSORS = ("linear.bias", "added")
WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "not a safetensors": (lambda path: path.write_text("hello"), "not a safetensors file"),
    "empty": (lambda path: path.write_bytes(b""), "not a safetensors file"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-100]), "not a safetensors file"),
    "absent": (lambda path: path.unlink(), "no such file"),
    "stranger": (lambda path: save_file({"a": torch.zeros(1)}, path), "not a checkpoint of rkd"),
    "newer": (lambda path: rewrite(path, {"format": 2}), "damaged or from a newer rkd"),
    "unknown field": (lambda path: rewrite(path, {"surprise": 1}), "surprise"),
    "huge": (lambda path: rewrite(path, {"embedding_size": 10**12}), "embedding_size"),
    "other size": (lambda path: rewrite(path, {"embedding_size": 9}), r"linear\..* has shape"),
    "unknown network": (lambda path: rewrite(path, {"base": "resnet19"}), "resnet19: no such network"),
    "lost tensor": (
        lambda path: rewrite(path, {"linear.bias": None}),
        r"1 tensors missing or unknown, first linear.bias",
    ),
    "flipped bit": (lambda path: flip(path, -1000), "wrong checksum"),
    "no network's name": (lambda path: rewrite(path, {"base": "resnet18\n"}), "base"),
    "no picture": (lambda path: rewrite(path, {"resize": 10**9}), "resize"),
    "no scale": (lambda path: rewrite(path, {"std": [0.0, 1.0, 1.0]}), "std"),
    "extra tensor": (
        lambda path: rewrite(path, {"added": torch.zeros(2)}),
        r"1 tensors missing or unknown, first added",
    ),
    "other type": (
        lambda path: rewrite(path, {"linear.bias": torch.zeros(8).half()}),
        "linear.bias has dtype F16, expected F32",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_file_is_one_line(saved: Path, kind: str) -> None:
    spoil, says = WRONG[kind]
    spoil(saved)
    with pytest.raises(CheckpointError, match=says) as caught:
        load_model(saved)
    assert str(caught.value).startswith(str(saved))
    assert "\n" not in str(caught.value)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_json(path, {"a": 1})

    def fail(partial: Path) -> None:
        partial.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(RunError, match=r"result.json: cannot be written \(No space left on device\)"):
        replace_file(path, fail)
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]
    with pytest.raises(RunError, match="No such file or directory"):
        write_json(tmp_path / "gone/result.json", {})
