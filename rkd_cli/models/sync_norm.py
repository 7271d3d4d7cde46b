"""Batch norm with statistics over the images of all processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rkd_cli.errors import SettingsError
from rkd_cli.runtime.distributed import Ranks


def synchronize(network: nn.Module, name: str, ranks: Ranks, device: torch.device) -> None:
    """Replace all batch norms of a network by synchronized ones with the same weights and names.

    torch's SyncBatchNorm supports CUDA only; on the CPU ``SyncNorm`` is used. ``name`` is for errors.
    """
    if ranks.size == 1:
        return
    for path, module in list(network.named_modules()):
        if not isinstance(getattr(module, "running_mean", None), Tensor):
            continue
        if type(module) is not nn.BatchNorm2d:  # a subclass may do more than normalize
            kind = type(module).__name__
            raise SettingsError(f"--sync-bn: {name} has a {kind}, which cannot be synchronized. Omit the flag.")
        parent, _, last = path.rpartition(".")
        convert: Any = nn.SyncBatchNorm.convert_sync_batchnorm
        synced = SyncNorm(module, ranks) if device.type == "cpu" else convert(module)
        setattr(network.get_submodule(parent), last, synced)


class SyncNorm(nn.BatchNorm2d):
    """Replacement of ``norm`` with statistics over all ranks, in forward and backward pass."""

    def __init__(self, norm: nn.BatchNorm2d, ranks: Ranks) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine, device="meta")
        self.ranks = ranks
        self.weight, self.bias = norm.weight, norm.bias
        self.running_mean, self.running_var = norm.running_mean, norm.running_var
        self.num_batches_tracked = norm.num_batches_tracked
        self.train(norm.training)

    def forward(self, images: Tensor) -> Tensor:
        """Normalize (n, C, H, W) maps of this rank's images."""
        if not self.training:
            return super().forward(images)
        found: tuple[Tensor, Tensor, Tensor, Tensor] = _Normalize.apply(images, self.eps, self.ranks)
        normalized, mean, variance, count = found
        with torch.no_grad():
            assert self.num_batches_tracked is not None
            assert self.running_mean is not None
            assert self.running_var is not None
            self.num_batches_tracked += 1
            weight = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), weight)
            unbiased = variance * (count / (count - 1))
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), weight)
        if self.affine:
            normalized = torch.addcmul(_along(self.bias), normalized, _along(self.weight))
        return normalized.to(images.dtype)


class _Normalize(torch.autograd.Function):
    """x to y = (x - m) / sqrt(v + eps), m, v and N, with mean m and variance v over the N values of all ranks.

    With sums over all ranks, dL/dx = (dL/dy - sum(dL/dy) / N - y sum(y dL/dy) / N) / sqrt(v + eps).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float, ranks: Ranks) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        variance, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
        m, v = mean.double(), variance.double()  # squares lose digits if the mean is much larger than the deviation
        own = torch.stack([torch.ones_like(m), m, v + m.square()]) * (wide.numel() // wide.shape[1])
        count, total, squares = ranks.sum(own)
        mean = total / count
        variance = squares / count - mean.square()
        scale = (variance + eps).rsqrt()
        y = (wide - _along(mean).to(wide.dtype)) * _along(scale).to(wide.dtype)
        ctx.ranks, ctx.dtype = ranks, x.dtype
        ctx.save_for_backward(y, scale, count)
        ctx.mark_non_differentiable(mean, variance, count)
        return y, mean, variance, count

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        y, scale, count = ctx.saved_tensors
        dy = gradients[0]
        sums = torch.stack([dy.sum((0, 2, 3)), (dy * y).sum((0, 2, 3))]).double()
        of_dy, of_ydy = (_along(total / count).to(dy.dtype) for total in ctx.ranks.sum(sums))
        return ((dy - of_dy - y * of_ydy) * _along(scale).to(dy.dtype)).to(ctx.dtype), None, None


def _along(channels: Tensor) -> Tensor:
    """(C,) to (1, C, 1, 1)."""
    return channels.view(1, -1, 1, 1)
