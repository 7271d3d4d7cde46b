"""Networks: their shape, where their weights come from, and what a checkpoint brings back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import save_file

from rkd_cli.errors import WeightsError
from rkd_cli.models import BACKBONES, EmbeddingNet, build_model


@pytest.mark.parametrize("base", BACKBONES)
def test_embeds_up_to_average_pooling(base: str) -> None:
    """Equal to the torchvision network with its classifier taken off, and a linear layer on top."""
    model = build_model(base, 8, l2normalize=False).eval()
    network = torchvision.models.get_model(base)
    head, features = BACKBONES[base]
    setattr(network, head, torch.nn.Identity())
    network.load_state_dict(model.base.state_dict())
    images = torch.rand(2, 3, 64, 64)
    normalised = torchvision.transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])(images)
    with torch.no_grad():
        expected = network.eval()(normalised)
        assert expected.shape == (2, features)
        assert torch.allclose(model(images), F.linear(expected, model.linear.weight, model.linear.bias), atol=1e-6)
        assert model.embedding_size == 8


def test_l2_normalised_embeddings_have_unit_length() -> None:
    free, unit = build_model("resnet18", 4, False).eval(), build_model("resnet18", 4, True).eval()
    unit.load_state_dict(free.state_dict())
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.allclose(unit(images), F.normalize(free(images)), atol=1e-6)
        assert torch.allclose(unit(images).norm(dim=1), torch.ones(3))


def test_bytes_and_fractions_are_the_same_image() -> None:
    model = EmbeddingNet(torch.nn.Flatten(), 3 * 4, 2, False)
    images = torch.randint(0, 256, (2, 3, 2, 2), dtype=torch.uint8)
    before = images.clone()
    assert torch.equal(model(images), model(images.float() / 255))
    assert torch.equal(images, before)


def test_parameter_counts_are_the_known_ones() -> None:
    assert build_model("resnet18", 64, False).parameter_count() == 11_176_512 + 512 * 64 + 64
    assert build_model("resnet50", 512, True).parameter_count() == 23_508_032 + 2048 * 512 + 512


@pytest.fixture
def network() -> torch.nn.Module:
    return torchvision.models.resnet18()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty weights cache, and no way to fetch anything."""

    def refuse(url: str, *args: object, **kwargs: object) -> None:
        raise OSError("no network in tests")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    folder = tmp_path / "torch/hub/checkpoints"
    folder.mkdir(parents=True)
    return folder


def test_imagenet_weights_are_v1_from_torchs_own_cache(hub: Path, network: torch.nn.Module) -> None:
    torch.save(network.state_dict(), hub / "resnet18-f37072fd.pth")
    model = build_model("resnet18", 8, False, "imagenet")
    for name, tensor in model.base.state_dict().items():
        assert torch.equal(tensor, network.state_dict()[name])


@pytest.mark.parametrize(
    ("base", "file"), [("resnet18", "resnet18-f37072fd.pth"), ("resnet50", "resnet50-0676ba61.pth")]
)
def test_weights_that_cannot_be_fetched_name_file_and_place(hub: Path, base: str, file: str) -> None:
    with pytest.raises(WeightsError) as caught:
        build_model(base, 8, False, "imagenet")
    (problem,) = caught.value.problems
    assert f"https://download.pytorch.org/models/{file}" in problem
    assert str(hub / file) in problem
    assert "no network in tests" in problem
    assert "--weights none" in problem


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
def test_weights_from_a_file(tmp_path: Path, network: torch.nn.Module, name: str) -> None:
    path = tmp_path / name
    save_file(network.state_dict(), path) if path.suffix == ".safetensors" else torch.save(network.state_dict(), path)
    model = build_model("resnet18", 8, False, str(path))
    assert torch.equal(model.base.state_dict()["layer4.1.conv2.weight"], network.state_dict()["layer4.1.conv2.weight"])


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("raise SystemExit('a pickle was run')",))


def test_wrong_weights_are_one_line(tmp_path: Path, network: torch.nn.Module) -> None:
    text, other, evil, lists = (tmp_path / name for name in ("t.pth", "o.pth", "e.pth", "l.pth"))
    text.write_text("hello")
    torch.save(torchvision.models.mobilenet_v3_small().state_dict(), other)
    torch.save({"conv1.weight": Evil()}, evil)
    torch.save([1, 2], lists)
    says = {
        tmp_path / "absent.pth": "no such file",
        text: "cannot be read",
        other: "not the weights of a resnet18",
        evil: "cannot be read",
        lists: "not a state dict",
    }
    for path, words in says.items():
        with pytest.raises(WeightsError, match=words) as caught:
            build_model("resnet18", 8, False, str(path))
        assert "\n" not in str(caught.value)
    with pytest.raises(WeightsError, match="unknown backbone vgg"):
        build_model("vgg", 8, False)
