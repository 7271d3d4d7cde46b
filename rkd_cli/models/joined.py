"""Several teachers as one: their embeddings side by side, and the one space that joins them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from rkd_cli.compress import apply_pca, principal_axes, scatter
from rkd_cli.geometry import normalized
from rkd_cli.models.checkpoint import read_tensors
from rkd_cli.models.embedding_net import EmbeddingNet
from rkd_cli.models.exported import ExportedNet

TEACHERS = "teachers.safetensors"  # their file in a run directory
JOINED, JOINED_VECTORS = "joined", "joined.vectors"  # bases in headers: of networks, and of vectors files
_FLAT = 1e-10  # total variance of unit-length rows that are equal but for rounding


class JoinedSpace(nn.Module):
    """The space of several teachers: a map of their unit-length embeddings, side by side, to unit-length rows.

    Each teacher's part is centered and divided so that its total variance is 1. PCA of the parts side by side sorts the
    dimensions and keeps the first ones. It does not whiten, which would make all distances about equal: RKD would have
    nothing to teach. Before ``fit`` or ``read``, the map is zero.

    Args:
        sizes: embedding size of each teacher.
        size: D of the space.
    """

    mean: Tensor  # float64 (sum of sizes,)
    map: Tensor  # float64 (D, sum of sizes)

    def __init__(self, sizes: Sequence[int], size: int) -> None:
        super().__init__()
        self.sizes = tuple(sizes)
        self.register_buffer("mean", torch.zeros(sum(sizes), dtype=torch.float64))
        self.register_buffer("map", torch.zeros(size, sum(sizes), dtype=torch.float64))

    @property
    def size(self) -> int:
        """D."""
        return len(self.map)

    def forward(self, rows: Tensor) -> Tensor:
        """(N, D) float32 unit-length rows of (N, sum of sizes) ones from ``side_by_side``."""
        return apply_pca(rows, self.mean, self.map, unit=True)

    def fit(self, rows: Tensor) -> None:
        """Fit the map to (N, sum of sizes) rows. A teacher whose rows are all equal adds nothing."""
        mean, found = scatter(rows)
        covariance = (found / len(rows)).cpu()
        scales = torch.cat([_scale(part).expand(len(part)) for part in _diagonal(covariance, self.sizes)])
        components, _ = principal_axes(scales[:, None] * covariance * scales, self.size)
        self.mean.copy_(mean)
        self.map.copy_(components * scales)

    def read(self, path: Path) -> None:
        """Read the map from a file of teachers; a CheckpointError if it is damaged or of other sizes."""
        self.load_state_dict(read_tensors(path, self.state_dict()))


def _diagonal(matrix: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """The square blocks of these sizes on the diagonal."""
    ends = list(itertools.accumulate(sizes))
    return [matrix[end - size : end, end - size : end] for end, size in zip(ends, sizes, strict=True)]


def _scale(covariance: Tensor) -> Tensor:
    """() factor that makes the total variance 1; 0 for rows that are equal but for rounding."""
    total = covariance.trace()
    return total.rsqrt().where(total > _FLAT, 0.0)


def joined_size(sizes: Sequence[int], images: int) -> int:
    """The number of dimensions that a space fitted to this number of images can have."""
    return min(sum(sizes), images - 1)


def side_by_side(parts: Sequence[Tensor]) -> Tensor:
    """(N, sum of sizes) rows of several teachers: their (N, Di) embeddings at unit length, side by side."""
    return torch.cat([normalized(part.float()) for part in parts], dim=1)


class JoinedNet(nn.Module):
    """Several networks that embed the same images, ``side_by_side`` or in their space."""

    def __init__(
        self, members: Sequence[EmbeddingNet | ExportedNet | JoinedNet], space: JoinedSpace | None = None
    ) -> None:
        super().__init__()
        self.members, self.networks, self.space = tuple(members), nn.ModuleList(members), space
        self.sizes = tuple(member.embedding_size for member in members)
        self.embedding_size: int = space.size if space else sum(self.sizes)
        self.l2normalize = space is not None

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) images, as ``EmbeddingNet`` takes them, to (N, D) float32 embeddings."""
        rows = side_by_side([member(images) for member in self.members])
        return rows if self.space is None else self.space.forward(rows)

    def parameter_count(self) -> int:
        """The number of parameters of all networks."""
        return sum(member.parameter_count() for member in self.members)
