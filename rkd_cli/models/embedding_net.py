"""Embedding networks: a backbone up to its pooling, one linear layer, perhaps l2 normalisation."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from rkd_cli.errors import CheckpointError, WeightsError
from rkd_cli.models import checkpoint
from rkd_cli.models.backbones import build_backbone, fold_batch_norms, map_channels, resnet_maps
from rkd_cli.models.normalization import Normalisation


class EmbeddingNet(nn.Module):
    """Images to embeddings. It normalises its images itself, so teacher and student can share one batch.

    Args:
        base: network from normalised images to (N, features) or (N, features, 1, 1).
        features: what ``base`` gives.
        embedding_size: D.
        l2normalize: whether embeddings are scaled to unit length.
        normalisation: what ``base`` expects of its images.
    Args (of the call):
        images: (N, 3, H, W), uint8 RGB, or floating RGB in [0, 1].
    Returns:
        (N, D) embeddings.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        base: nn.Module,
        features: int,
        embedding_size: int,
        l2normalize: bool,
        normalisation: Normalisation = Normalisation(),  # noqa: B008  # frozen
    ) -> None:
        super().__init__()
        self.base = base
        self.linear = nn.Linear(features, embedding_size)
        self.l2normalize = l2normalize
        self.normalisation = normalisation
        # constants of the network, but no weights: the checkpoint keeps them in its header
        with torch.device("cpu"):
            self.register_buffer("mean", torch.tensor(normalisation.mean).view(3, 1, 1), persistent=False)
            self.register_buffer("std", torch.tensor(normalisation.std).view(3, 1, 1), persistent=False)

    def normalise(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) float32, bit for bit what torchvision's ToTensor and Normalize make of the same pixels."""
        if images.dtype == torch.uint8:
            images = images.float().div_(255)
        if self.normalisation.bgr255:
            images = images[:, [2, 1, 0]] * 255
        side = self.normalisation.input_size
        if side and images.shape[-2:] != (side, side):
            images = F.interpolate(images, (side, side), mode="bilinear", antialias=True)
        return (images - self.mean).div_(self.std)

    def forward(self, images: Tensor) -> Tensor:
        return self._embed(self.base(self.normalise(images)))

    def with_maps(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """Feature maps after each of a ResNet's four blocks, and the embeddings."""
        maps, pooled = resnet_maps(self.base, self.normalise(images))
        return maps, self._embed(pooled)

    def _embed(self, features: Tensor) -> Tensor:
        # distances between embeddings need more digits than bf16 has, so autocast ends before the last layer
        with torch.autocast(features.device.type, enabled=False):
            features = features.flatten(1).to(self.linear.weight.dtype)  # (N, C, 1, 1) -> (N, C)
            embeddings: Tensor = self.linear(features)
            return F.normalize(embeddings, dim=1) if self.l2normalize else embeddings

    @property
    def embedding_size(self) -> int:
        """D."""
        return self.linear.out_features

    def map_channels(self) -> list[int]:
        """Channels of the four feature maps; none where the network has no such maps."""
        return map_channels(self.base) if isinstance(self.base, torchvision.models.ResNet) else []

    def parameter_count(self) -> int:
        """How many numbers training adjusts."""
        return sum(parameter.numel() for parameter in self.parameters())


def freeze(model: EmbeddingNet) -> EmbeddingNet:
    """For a network that only teaches: evaluation mode, no gradients, batch norms folded into the convolutions before
    them (its embeddings change by rounding alone). It can be saved no more."""
    fold_batch_norms(model.base)
    return model.requires_grad_(False).eval()


def placed(model: EmbeddingNet, device: torch.device) -> EmbeddingNet:
    """On the device, channels last: the order that images come in and that convolutions are fastest with."""
    model.to(device)
    model.to(memory_format=torch.channels_last)
    return model


def build_model(base: str, embedding_size: int, l2normalize: bool, weights: str = "none") -> EmbeddingNet:
    """A new network, its linear layer random from torch's generator.

    Args:
        base: a torchvision classification network, ``inception_v1bn``, or ``timm:`` and a name of timm's.
        embedding_size: D.
        l2normalize: whether embeddings are scaled to unit length.
        weights: ``imagenet`` (torchvision's IMAGENET1K_V1, fetched once into torch's own cache), ``none`` (random),
            or a file with the state dict of the whole network (.safetensors or .pth); its classifier is ignored.
    Raises:
        WeightsError: an unknown backbone, or weights that cannot be had or do not fit.
    """
    backbone = build_backbone(base, weights)
    return EmbeddingNet(backbone.network, backbone.features, embedding_size, l2normalize, backbone.normalisation)


def load_model(path: str | Path) -> EmbeddingNet:
    """The network of a checkpoint, from the file alone, in evaluation mode on the CPU.

    Raises:
        CheckpointError: the file is absent, damaged, or no checkpoint of this program.
    """
    path = Path(path)
    header = checkpoint.read_header(path)
    try:
        model = _skeleton(header)
        state = checkpoint.read_tensors(path, model.state_dict())
        if any(buffer.is_meta for name, buffer in model.named_buffers() if name not in state):
            # some networks hold constants that no file keeps: they have to be computed
            model = _described(header)
    except WeightsError as error:
        raise CheckpointError(*(f"{path}: {problem.removeprefix('--base ')}" for problem in error.problems)) from None
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(True).eval()


def _skeleton(header: checkpoint.Header) -> EmbeddingNet:
    """The network's shapes without their memory, so that a file is compared with them before any tensor is read."""
    try:
        with torch.device("meta"):
            return _described(header)
    except NotImplementedError:  # a network that computes while it is built (RegNet) needs real memory
        return _described(header)


def _described(header: checkpoint.Header) -> EmbeddingNet:
    backbone = build_backbone(header.base, "none")
    trained_on = Normalisation(header.mean, header.std, header.bgr255, header.input_size)
    return EmbeddingNet(backbone.network, backbone.features, header.embedding_size, header.l2normalize, trained_on)
