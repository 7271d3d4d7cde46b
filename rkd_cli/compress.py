"""Shorter and smaller vectors: leading dimensions, principal components, bytes, bits. Pure functions of tensors.

Bytes and bits are calibrated on the gallery alone, as an index is built before it is queried, and queries stay as they
are wherever they can: a query is one vector that is computed anew, the gallery is what takes the space.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from rkd_cli.geometry import normalized

_BLOCK_ELEMENTS = 1 << 22  # of what is widened to float64 at once: 32 MB
_BLOCK_ROWS = 1 << 12  # at most: rows may be short and come from long ones


class Rows(Protocol):
    """(N, D) of any floating type: a tensor, or what has its rows elsewhere and gives some of them as one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """N and D."""
        ...

    def __getitem__(self, rows: slice, /) -> Tensor:
        """Those rows."""
        ...


def blocks_of(x: Rows) -> Iterator[Tensor]:
    """The rows of ``x``, always in the same blocks, so that no more than one has to be in memory."""
    count, size = x.shape
    step = max(1, min(_BLOCK_ELEMENTS // size, _BLOCK_ROWS))
    return (x[start : start + step] for start in range(0, count, step))


def column_mean(x: Rows) -> Tensor:
    """(D,) float64, summed block by block."""
    return torch.stack([rows.sum(dim=0, dtype=torch.float64) for rows in blocks_of(x)]).sum(dim=0) / x.shape[0]


def leading(x: Tensor, size: int, unit: bool) -> Tensor:
    """The first dimensions of each row.

    Args:
        x: (N, D), any floating type.
        size: how many, at most D.
        unit: whether they are scaled to unit length again.
    Returns:
        (N, size) of the type of ``x``.
    """
    part = x[:, :size]
    return normalized(part) if unit and size < x.shape[1] else part


def vector_bytes(vectors: str, size: int) -> int:
    """What a vector takes in an index.

    Args:
        vectors: float (32 bits a dimension), float16, int8 or binary.
        size: D.
    """
    return {"float": 4 * size, "float16": 2 * size, "int8": size, "binary": (size + 7) // 8}[vectors]


def to_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Bytes of a gallery, symmetric about 0, with one scale a dimension: the largest magnitude there is 127.

    So the scales take nothing of a vector, and a dimension of small values keeps its digits.

    Args:
        x: (N, D), any floating type.
    Returns:
        (N, D) int8 and (D,) scales; ``codes * scales`` is within half a scale of ``x``.
    """
    scales = int8_scales(x)
    return to_codes(x, scales), scales


def int8_scales(x: Rows) -> Tensor:
    """The (D,) scales of ``to_int8``, float32 or the wider type of ``x``: in float16 small ones would be 0."""
    largest = torch.stack([rows.abs().amax(dim=0) for rows in blocks_of(x)]).amax(dim=0)
    scales = largest.to(torch.promote_types(largest.dtype, torch.float32)) / 127
    return scales.masked_fill(scales == 0, 1)


def to_codes(x: Tensor, scales: Tensor) -> Tensor:
    """(N, D) int8 by (D,) scales that are known."""
    return (x / scales).round_().to(torch.int8)


def to_signs(x: Tensor, threshold: Tensor) -> Tensor:
    """Bits, as 1 and -1: their squared Euclidean distance is four times the Hamming distance.

    Args:
        x: (N, D), any floating type.
        threshold: (D,), the gallery's ``column_mean``, so that each bit halves it as well as one number can.
    Returns:
        (N, D) of the type of ``x``; 1 where ``x`` is above.
    """
    return (x > threshold).to(x.dtype).mul_(2).sub_(1)


def fit_pca(x: Rows, size: int) -> tuple[Tensor, Tensor]:
    """The map onto the first principal components, in float64, always the same for the same rows.

    Args:
        x: (N, D), any floating type.
        size: how many components, at most D.
    Returns:
        (D,) mean and (size, D) map with orthonormal rows, the largest entry of each positive; for ``apply_pca``.
    """
    mean = column_mean(x)
    scatter = mean.new_zeros(x.shape[1], x.shape[1])
    for rows in blocks_of(x):
        centered = rows.double() - mean
        scatter.addmm_(centered.T, centered)
    components = torch.linalg.eigh(scatter).eigenvectors.flip(1)[:, :size].T  # they come in ascending order
    largest = components.gather(1, components.abs().argmax(dim=1, keepdim=True))
    return mean, components * largest.sign()


def apply_pca(x: Tensor, mean: Tensor, components: Tensor, unit: bool) -> Tensor:
    """Reduce rows by the map of ``fit_pca``.

    Args:
        x: (N, D), any floating type.
        mean: (D,).
        components: (size, D).
        unit: whether they are scaled to unit length then.
    Returns:
        (N, size) float32.
    """
    mean, components = mean.double(), components.double()
    reduced = torch.cat([((rows.double() - mean) @ components.T).float() for rows in blocks_of(x)])
    return normalized(reduced) if unit else reduced
