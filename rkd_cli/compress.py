"""Compression of embeddings: leading dimensions, PCA, int8, binary. Pure functions of tensors.

int8 and binary are calibrated on the gallery only, because an index is built before it is queried. Queries are not
compressed if avoidable: the gallery is what takes space.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from rkd_cli.geometry import normalized

_BLOCK_ELEMENTS = 1 << 22  # converted to float64 at once: 32 MB
_BLOCK_ROWS = 1 << 12  # at most: short rows may be prefixes of long ones


class Rows(Protocol):
    """(N, D) of any floating dtype: a tensor, or an object that reads slices of rows as tensors."""

    @property
    def shape(self) -> tuple[int, ...]:
        """N and D."""
        ...

    def __getitem__(self, rows: slice, /) -> Tensor:
        """Read these rows."""
        ...


def blocks_of(x: Rows) -> Iterator[Tensor]:
    """The rows of ``x`` in blocks that depend on its shape only, so that one block at a time is in memory."""
    count, size = x.shape
    step = max(1, min(_BLOCK_ELEMENTS // size, _BLOCK_ROWS))
    return (x[start : start + step] for start in range(0, count, step))


def column_mean(x: Rows) -> Tensor:
    """(D,) float64 mean, summed in blocks."""
    return torch.stack([rows.sum(dim=0, dtype=torch.float64) for rows in blocks_of(x)]).sum(dim=0) / x.shape[0]


def leading(x: Tensor, size: int, unit: bool) -> Tensor:
    """The first ``size`` of D dimensions of each row, scaled to unit length again if ``unit``."""
    part = x[:, :size]
    return normalized(part) if unit and size < x.shape[1] else part


def vector_bytes(vectors: str, size: int) -> int:
    """Bytes of an embedding of D dimensions in an index of float (32 bits), float16, int8 or binary."""
    return {"float": 4 * size, "float16": 2 * size, "int8": size, "binary": (size + 7) // 8}[vectors]


def to_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """(N, D) int8 codes of a gallery and (D,) scales, symmetric, one scale per dimension.

    ``codes * scales`` is within half a scale of ``x``.
    """
    scales = int8_scales(x)
    return to_codes(x, scales), scales


def int8_scales(x: Rows) -> Tensor:
    """The (D,) scales of ``to_int8`` in float32 or float64: float16 would round small ones to 0."""
    largest = torch.stack([rows.abs().amax(dim=0) for rows in blocks_of(x)]).amax(dim=0)
    scales = largest.to(torch.promote_types(largest.dtype, torch.float32)) / 127
    return scales.masked_fill(scales == 0, 1)


def to_codes(x: Tensor, scales: Tensor) -> Tensor:
    """(N, D) int8 codes for given (D,) scales."""
    return (x / scales).round_().to(torch.int8)


def to_signs(x: Tensor, threshold: Tensor) -> Tensor:
    """(N, D) binary codes as 1 (above the (D,) threshold, the gallery's ``column_mean``) and -1.

    Their squared Euclidean distance is four times the Hamming distance.
    """
    return (x > threshold).to(x.dtype).mul_(2).sub_(1)


def scatter(x: Rows) -> tuple[Tensor, Tensor]:
    """(D,) mean and (D, D) scatter matrix around it, in float64."""
    mean = column_mean(x)
    found = mean.new_zeros(x.shape[1], x.shape[1])
    for rows in blocks_of(x):
        centered = rows.double() - mean
        found.addmm_(centered.T, centered)
    return mean, found


def fit_pca(x: Rows, size: int) -> tuple[Tensor, Tensor]:
    """PCA in float64, deterministic: (D,) mean and (size, D) components, the largest entry of each positive."""
    mean, found = scatter(x)
    return mean, principal_axes(found, size)[0]


def fit_half_whitened(x: Rows, size: int) -> tuple[Tensor, Tensor]:
    """``fit_pca`` with each component divided by the square root of its standard deviation.

    Directions of large variance tell classes apart less than their variance says, so they count less. The components
    are divided by ``(v / mean(v) + 0.1) ** 0.25`` for the (size,) variances v; 0.1 bounds those of almost none.
    """
    mean, found = scatter(x)
    components, variances = principal_axes(found, size)
    relative = variances / variances.mean().clamp(min=torch.finfo(torch.float64).tiny)
    return mean, components / (relative + 0.1).pow(0.25)[:, None]


def principal_axes(covariance: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """(size, D) eigenvectors of a (D, D) matrix and (size,) eigenvalues, descending; largest entries positive."""
    values, vectors = (part.flip(-1)[..., :size] for part in torch.linalg.eigh(covariance))  # which sorts ascending
    axes = vectors.T
    largest = axes.gather(1, axes.abs().argmax(dim=1, keepdim=True))
    return axes * largest.sign(), values.clamp(min=0)


def apply_pca(x: Tensor, mean: Tensor, components: Tensor, unit: bool) -> Tensor:
    """(N, size) float32: rows reduced by the mean and components of ``fit_pca``, scaled to unit length if ``unit``."""
    mean, components = mean.double(), components.double()
    reduced = torch.cat([((rows.double() - mean) @ components.T).float() for rows in blocks_of(x)])
    return normalized(reduced) if unit else reduced
