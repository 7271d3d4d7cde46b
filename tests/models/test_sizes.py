"""Networks that take images of one size alone, built for the size of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torchvision.models.vision_transformer import interpolate_embeddings

from rkd_cli.models.backbones import build_backbone
from rkd_cli.models.checkpoint import read_header, save_model
from rkd_cli.models.embedding_net import EmbeddingNet, build_model, header_of, load_model
from rkd_cli.models.sources import open_network

# one of each kind; all of them are built in test_embedding_net.py
TORCHVISION = ["vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32", "vit_h_14", "swin_t", "swin_v2_t", "maxvit_t"]


def saved(model: EmbeddingNet, path: Path, base: str, image_size: int) -> EmbeddingNet:
    """The network as its checkpoint brings it back."""
    save_model(path, model.state_dict(), header_of(model, base, image_size, image_size, "folder"))
    return load_model(path)


@pytest.mark.parametrize("name", TORCHVISION)
def test_every_kind_of_transformer_of_torchvision_takes_images_of_224_pixels(name: str) -> None:
    """The largest has 2.5 GB, so without memory."""
    with torch.device("meta"):
        backbone = build_backbone(name, "none", 224)
        assert backbone.normalization.input_size in (None, 224)
        assert backbone.network.eval()(torch.zeros(1, 3, 224, 224)).shape == (1, backbone.features)


@pytest.mark.parametrize(("side", "taken"), [(None, 518), (224, 224), (256, 252), (64, 56), (5, 14)])
def test_a_transformer_of_torchvision_is_built_for_whole_patches(side: int | None, taken: int) -> None:
    """vit_h_14's first weights are of 518 pixels."""
    with torch.device("meta"):
        backbone = build_backbone("vit_h_14", "none", side)
        assert backbone.normalization.input_size == taken
        assert backbone.network(torch.zeros(1, 3, taken, taken)).shape == (1, 1280)


def test_weights_of_torchvision_are_interpolated_as_it_does(tmp_path: Path) -> None:
    network: Any = torchvision.models.vit_b_32().eval()
    torch.save(network.state_dict(), tmp_path / "w.pth")
    small: Any = torchvision.models.vit_b_32(image_size=96).eval()
    small.load_state_dict(interpolate_embeddings(96, 32, network.state_dict()))
    small.heads = torch.nn.Identity()
    backbone = build_backbone("vit_b_32", str(tmp_path / "w.pth"), 96)
    images = torch.rand(2, 3, 96, 96)
    with torch.inference_mode():
        assert torch.equal(backbone.network.eval()(images), small(images))


# a small one of each kind of timm's that has a size of its own, and the side that it takes of 96 pixels
TIMM = {
    "vit_tiny_patch16_224": 96,
    "swin_tiny_patch4_window7_224": 96,
    "eva02_tiny_patch14_224": 84,
    "mobilevit_xxs": None,
    "levit_128s": 224,  # its weights are of the places of an image of this size
}


@pytest.mark.parametrize("name", TIMM)
def test_weights_of_timm_are_interpolated_as_it_does_or_their_size_is_kept(tmp_path: Path, name: str) -> None:
    timm = pytest.importorskip("timm")
    published: Any = timm.create_model(name).eval()
    torch.save(published.state_dict(), tmp_path / "w.pth")
    model, header = open_network(f"timm:{name}", tmp_path / "w.pth", False, 96)
    side = TIMM[name]
    assert isinstance(model, EmbeddingNet)
    assert header.input_size == side
    images = torch.rand(2, 3, side or 96, side or 96)
    sized = {"img_size": side} if side else {}
    overlay = {"file": str(tmp_path / "w.pth"), "hf_hub_id": None, "url": ""}
    theirs: Any = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **sized).eval()
    with torch.inference_mode():
        expected = theirs.forward_head(theirs.forward_features(model.normalize(images)), pre_logits=True)
        torch.testing.assert_close(model(images), expected.flatten(1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("base", ["timm:vit_tiny_patch16_224", "timm:levit_128s"])
def test_a_checkpoint_brings_a_network_back_at_its_size(tmp_path: Path, base: str) -> None:
    pytest.importorskip("timm")
    model = build_model(base, 4, True, image_size=96).eval()
    loaded = saved(model, tmp_path / "m.safetensors", base, 96)
    assert loaded.normalization == model.normalization
    assert read_header(tmp_path / "m.safetensors").input_size == model.normalization.input_size
    images = torch.rand(2, 3, 96, 96)
    with torch.inference_mode():
        torch.testing.assert_close(loaded(images), model(images))


def test_a_checkpoint_of_a_network_of_the_published_size_stays_as_it_was(tmp_path: Path) -> None:
    """As runs at other sizes made them before: images are resized to that."""
    base = "timm:vit_tiny_patch16_224"
    pytest.importorskip("timm")
    model = build_model(base, 4, True).eval()
    assert model.normalization.input_size == 224
    loaded = saved(model, tmp_path / "m.safetensors", base, 64)
    images = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(loaded(images), model(images))


def test_dinov2_takes_images_of_224_pixels_as_they_are() -> None:
    pytest.importorskip("timm")
    with torch.device("meta"):
        name = "timm:vit_small_patch14_dinov2"
        assert build_backbone(name, "none").normalization.input_size == 518
        backbone = build_backbone(name, "none", 224)
        assert backbone.normalization.input_size == 224
        assert backbone.network.get_parameter("pos_embed").shape == (1, 1 + 16 * 16, 384)


@pytest.mark.parametrize(("side", "sides"), [(None, (256, 224)), (112, (128, 112))])
def test_a_pretrained_network_shows_the_same_share_of_an_image_at_every_size(
    tmp_path: Path, side: int | None, sides: tuple[int, int]
) -> None:
    name = "shufflenet_v2_x0_5"
    torch.save(torchvision.models.get_model(name).state_dict(), tmp_path / "w.pth")
    _, header = open_network(f"torchvision:{name}", tmp_path / "w.pth", image_size=side)
    assert (header.resize, header.image_size) == sides
