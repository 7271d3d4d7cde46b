"""Whatever gives vectors of images, by the name that a user gives it: a checkpoint of ours, or a pretrained network."""

from __future__ import annotations

import zlib
from pathlib import Path

import torch
from torch import nn

from rkd_cli.errors import WeightsError
from rkd_cli.models.backbones import build_backbone
from rkd_cli.models.checkpoint import read_header
from rkd_cli.models.embedding_net import EmbeddingNet, header_of, load_model
from rkd_cli.schemas import Header

_PRETRAINED = ("timm:", "torchvision:")


def is_pretrained(source: str) -> bool:
    """Whether ``source`` names a pretrained network, not a file."""
    return source.startswith(_PRETRAINED)


def open_network(source: str, weights: Path | None = None, l2normalize: bool = True) -> tuple[EmbeddingNet, Header]:
    """A network to embed images with, in evaluation mode on the CPU, and what is known of it.

    The embedding of a pretrained network is its pooled feature; its header has no data set and no training classes.

    Args:
        source: a checkpoint of this program, ``timm:NAME`` or ``torchvision:NAME``.
        weights: of a pretrained network, in the file format of its library; None: fetched once, kept by the library.
        l2normalize: whether the features of a pretrained network are scaled to unit length, so that they are compared
            by cosine, as such networks are evaluated; a checkpoint says itself.
    Raises:
        WeightsError: an unknown name, or weights that cannot be had or do not fit.
        CheckpointError: a file that is absent, damaged, or no checkpoint of this program.
    """
    if not is_pretrained(source):
        path = Path(source)
        return load_model(path), read_header(path)
    try:
        backbone = build_backbone(source.removeprefix("torchvision:"), "imagenet" if weights is None else str(weights))
    except WeightsError as error:  # they speak of --base
        raise WeightsError(*(problem.removeprefix("--base ") for problem in error.problems)) from None
    model = EmbeddingNet(backbone.network, backbone.features, None, l2normalize, backbone.normalization).eval()
    return model, header_of(model, source, *backbone.sides, dataset="")


def digest_of(model: nn.Module) -> str:
    """Of the weights, to notice others under the same name."""
    value = 0
    for name, tensor in sorted(model.state_dict().items()):
        value = zlib.crc32(name.encode(), value)
        value = zlib.crc32(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data, value)
    return f"{value:08x}"
