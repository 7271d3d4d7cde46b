"""Embeddings whose prefixes are embeddings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rkd_cli.geometry import check_rows, unit_rows


class Matryoshka(nn.Module):
    """Mean of a loss over prefixes of the embeddings (Kusupati et al., NeurIPS 2022; arXiv 2205.13147, equation 1).

    The paper's sum with all importances equal, divided by the number of prefixes: a loss keeps its scale. The whole
    embedding is always among them.

    Args:
        loss: called as ``loss(embeddings, x)``, with labels or the teacher's embeddings as ``x``; or an
            ``nn.ModuleList`` with one for each prefix and the last for the whole, as losses of a fixed size need
            (a queue, a projection).
        dims: lengths of the prefixes, rising.
        truncate_teacher: cut ``x`` to the same length. Relations need no such thing: a prefix then learns those of the
            whole teacher. A loss in the teacher's space does, and that is right only of a teacher whose own prefixes
            are good, as those of a Matryoshka or a PCA are.
        renormalize: scale what was cut to unit length, for networks that give unit length.
    Raises:
        ValueError: no prefix, or lengths that do not rise from 1 on.
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
            raise ValueError(f"lengths of prefixes must rise from 1 on: {', '.join(map(str, dims)) or 'none given'}")
        self.loss, self.dims = loss, tuple(dims)
        self.truncate_teacher, self.renormalize = truncate_teacher, renormalize

    def forward(self, embeddings: Tensor, x: Tensor) -> Tensor:
        """The loss of one batch.

        Args:
            embeddings: (N, D).
            x: (N,) labels, or (N, Dt) embeddings of the teacher.
        Returns:
            () loss in the embeddings' type.
        Raises:
            ValueError: rows that do not match, a prefix longer than D, or not one loss for each.
        """
        check_rows(embeddings, labels=x) if x.ndim == 1 else check_rows(embeddings, x)
        size = embeddings.shape[1]
        if self.dims[-1] > size:
            raise ValueError(f"a prefix of {self.dims[-1]} is longer than the embeddings, which have {size} dimensions")
        lengths = self.dims if self.dims[-1] == size else (*self.dims, size)
        losses = self.loss if isinstance(self.loss, nn.ModuleList) else [self.loss] * len(lengths)
        if len(losses) != len(lengths):
            raise ValueError(f"{len(losses)} losses for prefixes of {', '.join(map(str, lengths))}")
        terms = [
            loss(self._prefix(embeddings, length), self._prefix(x, length) if self.truncate_teacher else x)
            for loss, length in zip(losses, lengths, strict=True)
        ]
        return torch.stack(terms).mean().to(embeddings.dtype)

    def _prefix(self, rows: Tensor, length: int) -> Tensor:
        wide = rows[:, :length].to(torch.promote_types(rows.dtype, torch.float32))
        return unit_rows(wide).to(wide.dtype) if self.renormalize else wide
