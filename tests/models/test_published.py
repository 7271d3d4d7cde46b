"""Checkpoints in the published code's format, imported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision

from rkd_cli.errors import CheckpointError, SettingsError, WeightsError
from rkd_cli.models import build_model, load_model
from rkd_cli.models.checkpoint import read_header
from rkd_cli.models.published import Imported, import_checkpoint


def imported(path: Path, base: str = "resnet18", size: int = 16) -> Imported:
    return import_checkpoint(path, base, size, l2normalize=True, resize=72, image_size=64, dataset="cub200")


@pytest.fixture
def published(tmp_path: Path) -> tuple[Path, torch.nn.Module, torch.nn.Linear]:
    """A pickled state dict with the key names of the published LinearEmbedding, and the modules it was made of."""
    network, linear = torchvision.models.resnet18(), torch.nn.Linear(512, 16)
    base = {f"base.{k}": v for k, v in network.state_dict().items() if not k.startswith("fc.")}
    torch.save(base | {f"linear.{k}": v for k, v in linear.state_dict().items()}, tmp_path / "best.pth")
    return tmp_path / "best.pth", network, linear


def test_embeddings_are_those_of_the_same_weights_run_by_hand(
    published: tuple[Path, torch.nn.Module, torch.nn.Linear],
) -> None:
    path, network, linear = published
    result = imported(path)
    assert (result.path, result.ignored) == (path.with_suffix(".safetensors"), ())
    images = torch.rand(2, 3, 64, 64)
    network.fc = torch.nn.Identity()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        features = network.eval()((images - mean.view(3, 1, 1)) / std.view(3, 1, 1))
        assert torch.equal(load_model(result.path)(images), F.normalize(linear(features)))
    assert read_header(result.path).image_size == 64


def test_what_older_and_parallel_training_left_is_taken(
    published: tuple[Path, torch.nn.Module, torch.nn.Linear], tmp_path: Path
) -> None:
    path, *_ = published
    state = torch.load(path, weights_only=True)
    odd = {f"module.{k}": v for k, v in state.items() if "num_batches" not in k} | {
        "module.extra.weight": torch.ones(2)
    }
    torch.save(odd, tmp_path / "odd.pth")
    result = imported(tmp_path / "odd.pth")
    assert (result.ignored, result.note) == ((), "loaded module.*, ignored module.extra.*")
    assert torch.equal(load_model(result.path).state_dict()["linear.weight"], state["linear.weight"])


def test_published_inception_bn(tmp_path: Path) -> None:
    state = build_model("inception_v1bn", 8, True).state_dict()
    torch.save({k.replace("base.", "base.model.", 1): v for k, v in state.items()}, tmp_path / "bn.pth")
    result = imported(tmp_path / "bn.pth", "inception_v1bn", 8)
    loaded = load_model(result.path)
    assert loaded.normalization.bgr255
    assert torch.equal(loaded.state_dict()["linear.weight"], state["linear.weight"])


def test_what_does_not_fit_is_shown(published: tuple[Path, torch.nn.Module, torch.nn.Linear], tmp_path: Path) -> None:
    path, *_ = published
    with pytest.raises(CheckpointError) as caught:
        imported(path, size=8)
    assert "does not fit --base resnet18 --embedding-size 8" in caught.value.problems[0]
    assert "linear.weight is (16, 512) in the file and (8, 512) in the network" in caught.value.problems[1]
    with pytest.raises(CheckpointError) as caught:
        imported(path, "resnet50")
    assert len(caught.value.problems) == 7
    assert "more tensors" in caught.value.problems[-1]
    assert not path.with_suffix(".safetensors").exists()
    path.with_suffix(".safetensors").touch()
    with pytest.raises(SettingsError, match="already exists"):
        imported(path)
    with pytest.raises(WeightsError, match="no such file"):
        imported(tmp_path / "none.pth")
