"""Matryoshka embeddings: every trained prefix of an embedding is an embedding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rkd_cli.geometry import check_rows, unit_rows


class Matryoshka(nn.Module):
    """Mean of a loss over prefixes of the embeddings (Kusupati et al., NeurIPS 2022; arXiv 2205.13147, equation 1).

    The paper sums the prefixes with equal importance; the mean keeps the scale of the loss. The whole embedding is
    always one of the prefixes.

    Args:
        loss: called as ``loss(embeddings, x)``, with labels or the teacher's embeddings as ``x``. Losses of a fixed
            size (a queue, a projection) need an ``nn.ModuleList``: one for each prefix, the last for the whole.
        dims: numbers of dimensions of the prefixes, ascending.
        truncate_teacher: truncate ``x`` too. For losses in the teacher's space, and only if prefixes of the teacher
            are embeddings as well (Matryoshka, PCA). Otherwise each prefix learns from the whole teacher.
        renormalize: scale each prefix to unit length.
    Raises:
        ValueError: no prefix, or sizes that do not ascend from 1 or more.
    """

    def __init__(
        self,
        loss: nn.Module | nn.ModuleList,
        dims: Sequence[int],
        truncate_teacher: bool = False,
        renormalize: bool = False,
    ) -> None:
        super().__init__()
        if not dims or dims[0] < 1 or list(dims) != sorted(set(dims)):
            raise ValueError(f"prefix sizes must ascend from 1 or more, got {', '.join(map(str, dims)) or 'none'}")
        self.loss, self.dims = loss, tuple(dims)
        self.truncate_teacher, self.renormalize = truncate_teacher, renormalize

    def forward(self, embeddings: Tensor, x: Tensor) -> Tensor:
        """The loss of one batch.

        Args:
            embeddings: (N, D).
            x: (N,) labels, or (N, Dt) embeddings of the teacher.
        Returns:
            () loss in the embeddings' dtype.
        Raises:
            ValueError: N differs, a prefix is longer than D, or the number of losses is not that of the prefixes.
        """
        check_rows(embeddings, labels=x) if x.ndim == 1 else check_rows(embeddings, x)
        size = embeddings.shape[1]
        if self.dims[-1] > size:
            raise ValueError(f"a prefix has {self.dims[-1]} dimensions, the embeddings have only {size}")
        lengths = self.dims if self.dims[-1] == size else (*self.dims, size)
        losses = self.loss if isinstance(self.loss, nn.ModuleList) else [self.loss] * len(lengths)
        if len(losses) != len(lengths):
            raise ValueError(
                f"need one loss for each of the prefixes {', '.join(map(str, lengths))}, got {len(losses)}"
            )
        terms = [
            loss(self._prefix(embeddings, length), self._prefix(x, length) if self.truncate_teacher else x)
            for loss, length in zip(losses, lengths, strict=True)
        ]
        return torch.stack(terms).mean().to(embeddings.dtype)

    def _prefix(self, rows: Tensor, length: int) -> Tensor:
        wide = rows[:, :length].to(torch.promote_types(rows.dtype, torch.float32))
        return unit_rows(wide).to(wide.dtype) if self.renormalize else wide
