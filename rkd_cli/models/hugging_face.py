"""Networks of the transformers library from a folder, as teachers."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rkd_cli.errors import CheckpointError, SettingsError, first_line
from rkd_cli.models.embedding_net import EmbeddingNet, header_of
from rkd_cli.models.exported import quiet
from rkd_cli.models.normalization import Normalization
from rkd_cli.schemas import OWN_FIT, Header

PROCESSOR = "preprocessor_config.json"
_Three = tuple[float, float, float]
_STEP = 32  # of pixels: a network that takes images of one size fails on larger ones


class ImageFeatures(nn.Module):
    """What a vision model of transformers says of (N, 3, S, S) normalized images: (N, D).

    The image features of a model with text (CLIP, SigLIP), the class token where the pooler is a classifier's layer
    (ViT, DeiT), which may be untrained, else what the model pools, or the mean of its map.
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor) -> Tensor:
        """(N, D) of (N, 3, S, S)."""
        if hasattr(self.network, "get_image_features"):
            found = self.network.get_image_features(pixel_values=pixels)
            features: Tensor = found if isinstance(found, Tensor) else found.pooler_output
            return features
        found = self.network(pixel_values=pixels)
        pooled: Tensor | None = found.get("pooler_output")
        if pooled is None or hasattr(getattr(self.network, "pooler", None), "dense"):
            hidden = found.last_hidden_state
            pooled = hidden.mean((2, 3)) if hidden.ndim == 4 else hidden[:, 0]
        return pooled.flatten(1)


def open_transformers(folder: Path) -> tuple[EmbeddingNet, Header]:
    """The network of a folder of transformers, in evaluation mode, and its header.

    Its embeddings are scaled to unit length. Its size, mean and deviation are those of its image processor. Code in the
    folder is not run, pickles are not read.
    """
    processor, network = _loaded(folder)
    module, kind = ImageFeatures(network).eval(), network.config.model_type
    try:
        (resize, side), (mean, std) = _sides(processor), _statistics(processor)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        how = type(processor).__name__
        raise CheckpointError(f"{folder}: images cannot be prepared as {how} does ({first_line(error)})") from None
    try:
        size = module(torch.zeros(1, 3, side, side)).shape[1]
    except Exception as error:  # of a model that is none of images
        raise CheckpointError(f"{folder}: {kind} gives no features of images ({first_line(error)})") from None
    normalization = Normalization(mean, std, input_size=_fixed_side(module, side))
    model = EmbeddingNet(module, size, None, True, normalization).eval()
    return model, header_of(model, f"transformers:{kind}", resize, side, "", fit=OWN_FIT)


def _loaded(folder: Path) -> tuple[Any, Any]:
    """The image processor and the network."""
    try:
        library: Any = import_module("transformers")  # has few types
    except ImportError:
        raise SettingsError(f"{folder}: transformers is not installed. Run `pip install transformers`.") from None
    only = {"local_files_only": True, "trust_remote_code": False}
    bars = library.utils.logging
    shows_progress = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        with quiet():
            processor = library.AutoImageProcessor.from_pretrained(folder, **only)
            network, found = library.AutoModel.from_pretrained(
                folder, **only, use_safetensors=True, output_loading_info=True, dtype=torch.float32
            )
    except Exception as error:  # transformers raises different types for damaged folders
        raise CheckpointError(f"{folder}: transformers cannot load it ({first_line(error)})") from None
    finally:
        if shows_progress:
            bars.enable_progress_bar()
    missing = sorted(key for key in found["missing_keys"] if "pooler.dense" not in key)
    if missing:
        raise CheckpointError(f"{folder}: {len(missing)} tensors are missing, for example {missing[0]}")
    return processor, network


def _sides(processor: Any) -> tuple[int, int]:
    """(resize, crop) of an image processor."""
    resize = _side(processor.size)
    if getattr(processor, "do_center_crop", False) and processor.crop_size:
        crop = _side(processor.crop_size)
        return max(resize, crop), crop
    fraction = getattr(processor, "crop_pct", None)  # of ConvNeXT, whose processor crops by itself
    return (int(resize / fraction), resize) if fraction and resize < 384 else (resize, resize)


def _side(size: Any) -> int:
    sides = dict(size)
    if sides.get("width") != sides.get("height"):
        raise ValueError(f"it is not square: {sides}")
    return int(sides.get("shortest_edge") or sides["height"])


def _statistics(processor: Any) -> tuple[_Three, _Three]:
    """Mean and deviation of RGB in [0, 1]."""
    if getattr(processor, "do_flip_channel_order", False) or not getattr(processor, "do_rescale", True):
        raise ValueError("its input is not RGB in [0, 1]")
    if not processor.do_normalize:
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    (red, green, blue), (*std,) = processor.image_mean, processor.image_std
    return (red, green, blue), (std[0], std[1], std[2])


@torch.no_grad()
def _fixed_side(module: ImageFeatures, side: int) -> int | None:
    """``side`` if the network takes no other."""
    try:
        module(torch.zeros(1, 3, side + _STEP, side + _STEP))
    except Exception:  # whatever the network raises
        return side
    return None
