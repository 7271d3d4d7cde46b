"""Networks that Python code gives: any ``nn.Module``, timm's with their own preprocessing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from rkd_cli.errors import SettingsError, first_line
from rkd_cli.models.backbones import timm_preprocessing
from rkd_cli.models.embedding_net import EmbeddingNet, header_of
from rkd_cli.models.normalization import Normalization
from rkd_cli.schemas import MAX_EMBEDDING, OWN_FIT, Header

_SIDES = 256, 224  # resize and crop of a network that does not say its own


class Preprocessing(TypedDict, total=False):
    """What ``load`` must know of a network of yours; each may be omitted.

    Args:
        image_size: side of the images that it takes; by default 224, or timm's own.
        resize: side that images are resized to before the center crop; by default in timm's or ImageNet's proportion.
        mean, std: of the normalization of RGB in [0, 1]; by default ImageNet's, or timm's own.
        l2normalize: scale embeddings to unit length; True by default.
    """

    image_size: int
    resize: int
    mean: Sequence[float]
    std: Sequence[float]
    l2normalize: bool


def is_timm(module: nn.Module) -> bool:
    """Whether timm made a network."""
    return hasattr(module, "pretrained_cfg") and type(module).__module__.startswith("timm.")


def name_of(module: nn.Module) -> str:
    """The name that a run records: the class, for timm the name under which ``timm:NAME`` builds it."""
    if not is_timm(module):
        return type(module).__name__
    published: Any = module.pretrained_cfg
    tag = published.get("tag")
    return f"timm:{published['architecture']}" + (f".{tag}" if tag else "")


def from_module(module: nn.Module, **how: Any) -> tuple[EmbeddingNet, Header]:
    """An ``EmbeddingNet`` around a network, which is not copied, in evaluation mode, and its header.

    Args:
        module: from (N, 3, H, W) float32 images, normalized, to (N, D) or (N, D, 1, 1); or an ``EmbeddingNet``.
        how: as ``Preprocessing``.
    Raises:
        SettingsError: it fails on such images, or returns something else.
    """
    sides, normalization = _SIDES, Normalization()
    if is_timm(module):
        normalization, sides = timm_preprocessing(module)
    if not isinstance(module, EmbeddingNet):
        mean, std = (_three(name, how.get(name, getattr(normalization, name))) for name in ("mean", "std"))
        normalization = replace(normalization, mean=mean, std=std)
        network = EmbeddingNet(module, 1, None, how.get("l2normalize", True), normalization)
    elif not {"mean", "std", "l2normalize"}.isdisjoint(how):
        raise SettingsError("mean, std, l2normalize: an EmbeddingNet has its own. Omit them.")
    else:
        network = module
    side = how.get("image_size", sides[1])
    resize = how.get("resize", max(side, round(sides[0] * side / sides[1])))
    if network is not module:
        network.embedding_size = _probed(network.eval(), type(module).__name__, side)
    return network.eval(), header_of(network, name_of(module), resize, side, "", fit=OWN_FIT)


def _three(name: str, values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) != 3:
        raise SettingsError(f"{name}: must be three numbers, one a channel, got {values}")
    red, green, blue = map(float, values)
    return red, green, blue


@torch.no_grad()
def _probed(network: EmbeddingNet, name: str, side: int) -> int:
    """D, found with one empty image."""
    device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
    takes = f"A network takes (1, 3, {side}, {side}) normalized float images and returns (1, D) embeddings"
    try:
        found: object = network.base(network.to(device).normalize(torch.zeros(1, 3, side, side, device=device)))
    except Exception as error:  # of other people's code
        raise SettingsError(f"{name}: fails on an image of {side} pixels ({first_line(error)}). {takes}.") from None
    if not isinstance(found, Tensor) or not found.is_floating_point() or found.shape[0] != 1 or found.ndim < 2:
        got = f"{found.dtype} of shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise SettingsError(f"{name}: returns {got}. {takes}; wrap it in a module that does.")
    size = found.flatten(1).shape[1]
    if size > MAX_EMBEDDING:
        raise SettingsError(f"{name}: returns {size} dimensions, more than {MAX_EMBEDDING}. {takes}.")
    return size
