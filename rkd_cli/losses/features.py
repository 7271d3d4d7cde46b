"""Losses between feature maps of a student and a teacher."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rkd_cli.geometry import check_rows, in_range


class AttentionTransfer(nn.Module):
    """Mean squared difference of spatial attention maps (Zagoruyko, Komodakis; ICLR 2017; arXiv 1612.03928, eq. 2).

    An attention map is the mean over channels of the squared activations, flattened and scaled to unit length.
    """

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of one batch.

        Args:
            student: (N, Cs, H, W) feature map.
            teacher: (N, Ct, H, W) feature map; no gradient flows to it.
        Returns:
            () loss in float32, or in float64 for float64 maps.
        Raises:
            ValueError: N, H or W differ, or a dtype is not floating.
        """
        _check_maps(student, teacher)
        with torch.autocast(student.device.type, enabled=False):
            with torch.no_grad():
                target = _attention(teacher)
            return F.mse_loss(_attention(student), target)


def _check_maps(student: Tensor, teacher: Tensor) -> None:
    both = student, teacher
    alike = student.shape[:1] + student.shape[2:] == teacher.shape[:1] + teacher.shape[2:]
    if not alike or any(x.ndim != 4 or x.numel() == 0 or not x.is_floating_point() for x in both):
        found = " and ".join(f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}" for x in both)
        raise ValueError(f"need two floating (N, C, H, W) feature maps with equal N, H and W, got {found}")


def _attention(maps: Tensor) -> Tensor:
    return F.normalize(in_range(maps).square().mean(dim=1).flatten(1), dim=1)  # (N, C, H, W) -> (N, H W)


class FitNet(nn.Module):
    """Mean squared difference of a teacher's feature map and a 1x1 convolution of the student's.

    Romero et al., ICLR 2015; arXiv 1412.6550, equation 3. Embeddings are treated as maps of one pixel.

    The published RKD experiments never train the convolution (``transform``, uniform in +-0.005): its parameters are
    not given to the optimizer. To train it, add ``loss.parameters()`` to yours.

    Args:
        student_channels: Cs.
        teacher_channels: Ct.
    """

    def __init__(self, student_channels: int, teacher_channels: int) -> None:
        super().__init__()
        self.transform = nn.Conv2d(student_channels, teacher_channels, kernel_size=1, bias=False)
        nn.init.uniform_(self.transform.weight, -0.005, 0.005)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of one batch.

        Args:
            student: (N, Cs, H, W) or (N, Cs).
            teacher: (N, Ct, H, W) or (N, Ct).
        Returns:
            () loss in the convolution's dtype.
        Raises:
            ValueError: N, H or W differ, or Cs and Ct are not the channels of the convolution.
        """
        rows = student.ndim == teacher.ndim == 2
        check_rows(student, teacher) if rows else _check_maps(student, teacher)
        channels = self.transform.in_channels, self.transform.out_channels
        if (student.shape[1], teacher.shape[1]) != channels:
            found = f"{tuple(student.shape)} and {tuple(teacher.shape)}"
            raise ValueError(f"need {channels[0]} and {channels[1]} channels for this convolution, got {found}")
        if rows:
            student, teacher = student[:, :, None, None], teacher[:, :, None, None]
        work = self.transform.weight.dtype
        with torch.autocast(student.device.type, enabled=False):
            return F.mse_loss(self.transform(student.to(work)), teacher.to(work))
