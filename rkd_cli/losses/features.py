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
            teacher: (N, Ct, H, W) feature map of the same height and width; no gradient flows to it.
        Returns:
            () loss, in float32 or the maps' wider type.
        Raises:
            ValueError: not maps of the same N images, height and width.
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
        raise ValueError(f"need (N, C, H, W) feature maps of one N, H and W, floating and not empty, got {found}")


def _attention(maps: Tensor) -> Tensor:
    return F.normalize(in_range(maps).square().mean(dim=1).flatten(1), dim=1)  # (N, C, H, W) -> (N, H W)


class FitNet(nn.Module):
    """Mean squared difference of a teacher's feature map and a 1x1 convolution of the student's.

    Romero et al., ICLR 2015; arXiv 1412.6550, equation 3. Embeddings count as maps of one pixel.

    The published RKD experiments leave the convolution (``transform``, uniform in +-0.005) as it was drawn: its
    parameters were never given to the optimizer. Whoever wants it trained adds ``loss.parameters()``.

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
            teacher: (N, Ct, H, W) or (N, Ct), the same height and width.
        Returns:
            () loss in the type of the convolution.
        Raises:
            ValueError: not maps of the same N images, height and width, or not the channels of the convolution.
        """
        rows = student.ndim == teacher.ndim == 2
        check_rows(student, teacher) if rows else _check_maps(student, teacher)
        channels = self.transform.in_channels, self.transform.out_channels
        if (student.shape[1], teacher.shape[1]) != channels:
            found = f"{tuple(student.shape)} and {tuple(teacher.shape)}"
            raise ValueError(f"need {channels[0]} and {channels[1]} channels, as the convolution, got {found}")
        if rows:
            student, teacher = student[:, :, None, None], teacher[:, :, None, None]
        work = self.transform.weight.dtype
        with torch.autocast(student.device.type, enabled=False):
            return F.mse_loss(self.transform(student.to(work)), teacher.to(work))
