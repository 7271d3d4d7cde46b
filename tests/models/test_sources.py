"""Whatever gives vectors, by its name: opened as what it is, and a mistyped name is told what it may have meant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file

from rkd_cli.embedding.embedder import open_embedder
from rkd_cli.embedding.vectors import write_vectors
from rkd_cli.errors import CheckpointError, WeightsError
from rkd_cli.models import EmbeddingNet, build_model
from rkd_cli.models.checkpoint import read_checksum, save_model
from rkd_cli.models.embedding_net import header_of
from rkd_cli.models.sources import digest_of, located
from rkd_cli.schemas import Header

NAME = "shufflenet_v2_x0_5"


def saved(path: Path) -> Path:
    model = build_model(NAME, 8, True)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_model(path, model.state_dict(), header_of(model, NAME, 36, 32, "folder"))
    return path


def test_a_checkpoint_is_a_network(tmp_path: Path) -> None:
    path = saved(tmp_path / "run/best.safetensors")
    source = open_embedder(str(path))
    assert source.network is not None and source.header is not None and source.vectors is None
    assert (source.header.base, source.network.embedding_size) == (NAME, 8)
    assert source.digest == read_checksum(path)
    assert located(str(tmp_path / "run")) == located(str(path)) == str(path)


@pytest.mark.parametrize("l2normalize", [True, False])
def test_a_pretrained_network_gives_its_pooled_features(tmp_path: Path, l2normalize: bool) -> None:
    network = torchvision.models.get_model(NAME).eval()
    torch.save(network.state_dict(), tmp_path / "w.pth")
    source = open_embedder(f"torchvision:{NAME}", tmp_path / "w.pth", l2normalize)
    assert isinstance(source.network, EmbeddingNet) and source.header is not None
    assert (source.header.dataset, source.header.l2normalize) == ("", l2normalize)
    assert located(source.name) == source.name
    network.fc = torch.nn.Identity()
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        features = network(source.network.normalize(images))
        expected = features / features.norm(dim=1, keepdim=True) if l2normalize else features
        torch.testing.assert_close(source.network(images), expected)


@pytest.mark.parametrize(
    ("change", "is_another"),
    [
        ({"base": "timm:resnet18"}, True),
        ({"mean": (0.5, 0.5, 0.5)}, True),
        ({"std": (0.5, 0.5, 0.5)}, True),
        ({"bgr255": True}, True),
        ({"input_size": 32}, True),
        ({"resize": 40}, True),
        ({"image_size": 30}, True),
        ({"l2normalize": False}, True),
        ({"epoch": 3, "dataset": "sop", "train_recall": {1: 0.5}, "eval_recall": {1: 0.5}}, False),
        ({"select_on": "val", "seen_classes": ("a-b",), "version": "9"}, False),
    ],
)
def test_a_digest_covers_all_that_changes_embeddings(change: dict[str, Any], is_another: bool) -> None:
    network = torch.nn.Linear(3, 2)
    header = Header(
        base=NAME, embedding_size=2, l2normalize=True, resize=36, image_size=32, mean=(0.4, 0.4, 0.4),
        std=(0.2, 0.2, 0.2), dataset="", epoch=0, train_recall={}, eval_recall={},
    )  # fmt: skip
    digest = digest_of(network, header)
    assert digest_of(network, header) == digest
    assert (digest_of(network, header.model_copy(update=change)) != digest) == is_another


def test_a_digest_covers_values_and_shapes() -> None:
    header = header_of(build_model(NAME, 8, True), NAME, 36, 32, "")
    one, other = torch.nn.Linear(3, 2, bias=False), torch.nn.Linear(2, 3, bias=False)
    digest = digest_of(one, header)
    with torch.no_grad():
        other.weight.copy_(one.weight.reshape(3, 2))
        assert digest_of(other, header) != digest
        one.weight[0, 0] += 1
    assert digest_of(one, header) != digest


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("timm:tf_efficientnet_lite0", "timm:efficientnet_lite0"),  # other means and padding
        ("timm:resnet18.a1_in1k", "timm:resnet18.tv_in1k"),  # resized to 236 and 256 pixels
    ],
)
def test_names_that_share_a_file_of_weights_have_other_digests(tmp_path: Path, one: str, other: str) -> None:
    file = tmp_path / "w.safetensors"
    save_file(timm.create_model(one.removeprefix("timm:")).state_dict(), file)
    sources = [open_embedder(name, file) for name in (one, other, one)]
    headers = [source.header for source in sources]
    assert headers[0] and headers[1]
    assert (headers[0].mean, headers[0].resize) != (headers[1].mean, headers[1].resize)
    assert sources[0].digest == sources[2].digest != sources[1].digest
    assert open_embedder(one, file, unit=False).digest != sources[0].digest


def test_embeddings_are_no_network(tmp_path: Path) -> None:
    write_vectors(tmp_path / "v.npz", np.eye(2, 3, dtype=np.float32), ["a", "b"])
    source = open_embedder(str(tmp_path / "v.npz"))
    assert source.network is None and source.header is None and source.vectors is not None
    assert source.digest == source.vectors.digest


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("resnet50", "resnet50: no such file or folder. Did you mean torchvision:resnet50?"),
        ("resnet5O", "Did you mean torchvision:resnet50?"),
        ("vit_small_patch14_dinov2.lvd142m", "Did you mean timm:vit_small_patch14_dinov2"),
        ("torchvison:resnet50", "Did you mean torchvision:resnet50?"),
        ("tim:resnet50", "Did you mean timm:resnet50?"),
        ("student/bset.safetensors", "Did you mean student/best.safetensors?"),
        ("studnet", "Did you mean student?"),
        (
            "nowhere/of/mine.safetensors",
            "no such file or folder. Name a run directory, a checkpoint, timm:NAME, torchvision:NAME",
        ),
        ("empty", "empty: contains no best.safetensors"),
    ],
)
def test_a_mistyped_name_gets_a_hint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, says: str) -> None:
    saved(tmp_path / "student/best.safetensors")
    (tmp_path / "resnet50.txt").touch()  # a name that is right but for its library is meant before a file like it
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        located(name)
    assert says in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_a_network_that_does_not_exist_and_weights_that_cannot_be_fetched(
    library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(WeightsError, match=r"resnet5O: no such network. Did you mean (timm:)?resnet50 "):
        open_embedder(f"{library}:resnet5O")

    def fail(*_: object, **__: object) -> None:
        raise OSError("the network is down")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", fail)
    monkeypatch.setattr("timm.models.load_pretrained", fail)
    with pytest.raises(
        WeightsError, match=r"cannot be downloaded .the network is down.. Download https://.*--weights"
    ) as caught:
        open_embedder(f"{library}:resnet18")
    assert "random" not in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
