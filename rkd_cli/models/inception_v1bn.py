"""The Inception-BN network of the published experiments, up to its average pooling."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rkd_cli.models.normalization import Normalization

FEATURES = 1024
NORMALIZATION = Normalization((104.0, 117.0, 128.0), (1.0, 1.0, 1.0), bgr255=True)
URL = "http://data.lip6.fr/cadene/pretrainedmodels/bn_inception-239d2248.pth"  # checked against the hash in its name
UNUSED = ("last_linear.",)

# As in the published code. In PyTorch this is the weight of the newest batch, so running statistics are almost those of
# the last batch. (In Caffe, where these weights come from, it is the weight of the old average; later releases of the
# module use 0.1.) The published networks were trained with 0.9.
_MOMENTUM = 0.9


class Block(NamedTuple):
    """Channels of the branches of an inception block, concatenated in this order.

    A block without ``one`` and ``proj`` has stride 2, and its pooling branch has no convolution.
    """

    one: int  # 1x1
    reduce: int  # 1x1, before
    three: int  # 3x3
    double_reduce: int  # 1x1, before
    double_1: int  # 3x3, before
    double_2: int  # 3x3
    pool: str  # avg or max: 3x3, before
    proj: int  # 1x1

    @property
    def stride(self) -> int:
        """2 if the block halves its maps, else 1."""
        return 1 if self.one else 2

    def channels(self, given: int) -> int:
        """The number of output channels for ``given`` input channels."""
        return self.one + self.three + self.double_2 + (self.proj or given)


BLOCKS = {
    "3a": Block(64, 64, 64, 64, 96, 96, "avg", 32),
    "3b": Block(64, 64, 96, 64, 96, 96, "avg", 64),
    "3c": Block(0, 128, 160, 64, 96, 96, "max", 0),
    "4a": Block(224, 64, 96, 96, 128, 128, "avg", 128),
    "4b": Block(192, 96, 128, 96, 128, 128, "avg", 128),
    "4c": Block(160, 128, 160, 128, 160, 160, "avg", 128),
    "4d": Block(96, 128, 192, 160, 192, 192, "avg", 128),
    "4e": Block(0, 128, 192, 192, 256, 256, "max", 0),
    "5a": Block(352, 192, 320, 160, 224, 224, "avg", 128),
    "5b": Block(352, 192, 320, 192, 224, 224, "max", 128),
}


class InceptionV1BN(nn.Module):
    """(N, 3, H, W) normalized images (BGR in 0..255, minus 104, 117, 128) to (N, 1024) features.

    Names of weights are those of the published ``bn_inception-239d2248.pth`` without its classifier.
    """

    def __init__(self) -> None:
        super().__init__()
        self._add("conv1_7x7_s2", 3, 64, 7, stride=2)
        self._add("conv2_3x3_reduce", 64, 64, 1)
        self._add("conv2_3x3", 64, 192, 3)
        given = 192
        for name, block in BLOCKS.items():
            prefix, stride = f"inception_{name}", block.stride
            if block.one:
                self._add(f"{prefix}_1x1", given, block.one, 1)
            self._add(f"{prefix}_3x3_reduce", given, block.reduce, 1)
            self._add(f"{prefix}_3x3", block.reduce, block.three, 3, stride)
            self._add(f"{prefix}_double_3x3_reduce", given, block.double_reduce, 1)
            self._add(f"{prefix}_double_3x3_1", block.double_reduce, block.double_1, 3)
            self._add(f"{prefix}_double_3x3_2", block.double_1, block.double_2, 3, stride)
            if block.proj:
                self._add(f"{prefix}_pool_proj", given, block.proj, 1)
            given = block.channels(given)

    def forward(self, images: Tensor) -> Tensor:
        # the published 7x7 average for images of 224 pixels, and for any other size
        return F.adaptive_avg_pool2d(self.features(images), 1).flatten(1)

    def features(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, 1024, h, w), the maps before pooling."""
        maps = F.max_pool2d(self._run(images, "conv1_7x7_s2"), 3, 2, ceil_mode=True)
        maps = F.max_pool2d(self._run(maps, "conv2_3x3_reduce", "conv2_3x3"), 3, 2, ceil_mode=True)
        for name in BLOCKS:
            maps = self.inception(name, maps)
        return maps

    def inception(self, name: str, maps: Tensor) -> Tensor:
        """Apply one of ``BLOCKS`` to maps (N, C, h, w)."""
        block, prefix = BLOCKS[name], f"inception_{name}"
        branches = [self._run(maps, f"{prefix}_1x1")] if block.one else []
        branches.append(self._run(maps, f"{prefix}_3x3_reduce", f"{prefix}_3x3"))
        double = f"{prefix}_double_3x3"
        branches.append(self._run(maps, f"{double}_reduce", f"{double}_1", f"{double}_2"))
        if block.pool == "avg":
            pooled = F.avg_pool2d(maps, 3, 1, padding=1)  # averages over padding too
        elif block.stride == 1:
            pooled = F.max_pool2d(maps, 3, 1, padding=1)
        else:
            # The published code has no padding, which works only for even maps (image sides that are multiples of 32).
            # For odd maps, padding aligns the pooled maps with those of the convolutions.
            pooled = F.max_pool2d(maps, 3, 2, padding=(maps.shape[-2] % 2, maps.shape[-1] % 2), ceil_mode=True)
        branches.append(self._run(pooled, f"{prefix}_pool_proj") if block.proj else pooled)
        return torch.cat(branches, 1)

    def _add(self, name: str, given: int, made: int, kernel: int, stride: int = 1) -> None:
        # biases before a batch norm have no effect, but the published file contains them
        self.add_module(name, nn.Conv2d(given, made, kernel, stride, padding=kernel // 2))
        self.add_module(f"{name}_bn", nn.BatchNorm2d(made, eps=1e-5, momentum=_MOMENTUM))

    def _run(self, maps: Tensor, *names: str) -> Tensor:
        for name in names:
            maps = F.relu(getattr(self, f"{name}_bn")(getattr(self, name)(maps)), inplace=True)
        return maps


def build() -> InceptionV1BN:
    """The network with random weights."""
    return InceptionV1BN()


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Reshape batch norms, which the published file stores as (1, C)."""
    return {name: tensor.flatten() if tensor.ndim == 2 else tensor for name, tensor in state.items()}
