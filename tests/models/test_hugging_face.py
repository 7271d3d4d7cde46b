"""Networks of transformers as teachers: what transformers itself computes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import rkd_cli
from rkd_cli.errors import CheckpointError
from rkd_cli.models.layouts import open_layout

transformers = pytest.importorskip("transformers")

SIDE = 32
TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
VISION = {**TINY, "patch_size": 8, "image_size": SIDE}
TEXT = {**TINY, "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SQUARE = {"height": SIDE, "width": SIDE}


def vit(kind: str = "ViTModel") -> tuple[Any, Any]:
    config = transformers.ViTConfig(**VISION)
    return getattr(transformers, kind)(config), transformers.ViTImageProcessor(size=SQUARE)


def dinov2() -> tuple[Any, Any]:
    processor = transformers.BitImageProcessor(size={"shortest_edge": SIDE + 4}, crop_size=SQUARE)
    return transformers.Dinov2Model(transformers.Dinov2Config(**VISION)), processor


def convnext() -> tuple[Any, Any]:
    config = transformers.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2)
    processor = transformers.ConvNextImageProcessor(size={"shortest_edge": SIDE}, crop_pct=0.875)
    return transformers.ConvNextModel(config), processor


def clip() -> tuple[Any, Any]:
    config = transformers.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=12)
    return transformers.CLIPModel(config), transformers.CLIPImageProcessor(
        size={"shortest_edge": SIDE}, crop_size=SQUARE
    )


def saved(folder: Path, model: Any, processor: Any) -> Path:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("make", "features", "resize", "only"),
    [
        (vit, lambda net, x: net(x).last_hidden_state[:, 0], SIDE, SIDE),
        (dinov2, lambda net, x: net(x).pooler_output, SIDE + 4, None),
        (convnext, lambda net, x: net(x).pooler_output.flatten(1), 36, None),
        (clip, lambda net, x: net.visual_projection(net.vision_model(x).pooler_output), SIDE, SIDE),
    ],
)
def test_its_embeddings_are_what_transformers_computes(
    make: Callable[[], Any], features: Callable[[Any, Tensor], Tensor], resize: int, only: int | None, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    network, processor = make()
    model, header = open_layout(saved(tmp_path, network, processor))
    assert (header.resize, header.image_size, header.input_size) == (resize, SIDE, only)
    images = torch.randint(0, 256, (2, 3, SIDE, SIDE), dtype=torch.uint8)
    how = {"do_resize": False, "do_center_crop": False, "return_tensors": "pt"}
    pixels = processor([Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images], **how)["pixel_values"]
    with torch.no_grad():
        due = F.normalize(features(network.eval(), pixels))
        torch.testing.assert_close(model(images), due, rtol=1e-4, atol=1e-5)


def test_a_classifier_without_a_pooler_gives_its_class_token(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network, processor = vit("ViTForImageClassification")
    model, _ = open_layout(saved(tmp_path, network, processor))
    images = torch.randint(0, 256, (2, 3, SIDE, SIDE), dtype=torch.uint8)
    with torch.no_grad():
        due = F.normalize(network.eval().vit(images / 127.5 - 1).last_hidden_state[:, 0])
        torch.testing.assert_close(model(images), due, rtol=1e-4, atol=1e-5)


def test_a_map_without_a_pooler_gives_its_mean(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_encoder_blocks": 2, "num_attention_heads": [1, 2]}
    network = transformers.SegformerModel(transformers.SegformerConfig(**sizes, sr_ratios=[2, 1]))
    processor = transformers.SegformerImageProcessor(size=SQUARE, do_normalize=False)
    model, _ = open_layout(saved(tmp_path, network, processor))
    images = torch.randint(0, 256, (2, 3, SIDE, SIDE), dtype=torch.uint8)
    with torch.no_grad():
        due = F.normalize(network.eval()(images / 255).last_hidden_state.mean((2, 3)))
        torch.testing.assert_close(model(images), due, rtol=1e-4, atol=1e-5)


def test_it_embeds_files_and_two_loads_are_one_model(tmp_path: Path) -> None:
    folder = saved(tmp_path / "net", *dinov2())
    photo = tmp_path / "photo.png"
    Image.fromarray(np.arange(40 * 50 * 3, dtype=np.uint8).reshape(40, 50, 3)).save(photo)
    first, again = rkd_cli.load(folder), rkd_cli.load(folder)
    assert np.array_equal(first.embed([photo]), again.embed([photo]))
    assert first.header.base == "transformers:dinov2"


def test_what_it_cannot_run_is_one_line(tmp_path: Path) -> None:
    bert = transformers.BertModel(transformers.BertConfig(**TEXT))
    with pytest.raises(CheckpointError, match=r"text: bert gives no features of images \("):
        open_layout(saved(tmp_path / "text", bert, transformers.ViTImageProcessor(size=SQUARE)))
    folder = saved(tmp_path / "whole", *vit())
    (folder / "preprocessor_config.json").rename(tmp_path / "processor.json")
    with pytest.raises(CheckpointError, match=r"whole: transformers cannot load it \("):
        open_layout(folder)
    (tmp_path / "processor.json").rename(folder / "preprocessor_config.json")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match=r"whole: \d+ tensors are missing, for example "):
        open_layout(folder)
    (folder / "config.json").write_text(json.dumps(config))
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    for change in ({"size": {"longest_edge": 32}}, {"size": {"height": 32, "width": 16}}, {"image_mean": [0.5]}):
        (folder / "preprocessor_config.json").write_text(json.dumps(processor | change))
        with pytest.raises(CheckpointError, match=r"whole: images cannot be prepared as ViTImageProcessor\w* does \("):
            open_layout(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    (folder / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=r"whole: transformers cannot load it \("):
        open_layout(folder)
