"""Parts of the losses in the teacher's embedding space: unit-length pairs and a queue of past teacher embeddings."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rkd_cli.geometry import check_rows, unit_rows


def unit_pair(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both (N, D) embeddings of a batch at unit length in float64, the teacher's without gradient."""
    check_rows(student, teacher, same_size=True)
    return unit_rows(student), unit_rows(teacher.detach())


def softmax_divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """Mean over the rows of (N, M) logits of KL(softmax(teacher) || softmax(student))."""
    return F.kl_div(student.log_softmax(dim=1), teacher.log_softmax(dim=1), reduction="batchmean", log_target=True)


class TeacherQueue(nn.Module):
    """Ring buffer of the last ``length`` teacher embeddings, part of the state dict.

    ``size`` is D, by default that of the first rows pushed or loaded.
    """

    rows: Tensor  # (length, D) float32
    pushed: Tensor  # () int64, rows pushed so far

    def __init__(self, length: int, size: int | None = None) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(length, size or 0))
        self.register_buffer("pushed", torch.zeros((), dtype=torch.int64))
        self._count: int | None = 0  # ``pushed``, known without a sync; None after loading

    def contents(self) -> Tensor:
        """(M, D) float64, the stored rows in any order: a copy, because autograd saves it and a push overwrites."""
        if self._count is None:
            self._count = int(self.pushed)  # a sync on CUDA, once
        stored = min(self._count, len(self.rows))
        return self.rows[:stored].to(torch.float64, copy=True)

    def behind(self, batch: Tensor) -> Tensor:
        """(N + M, D) the rows of a batch, then the stored ones."""
        self._check(batch)
        stored = self.contents()
        return torch.cat([batch, stored]) if len(stored) else batch

    @torch.no_grad()
    def push(self, rows: Tensor) -> None:
        """Store (N, D) rows in place of the oldest."""
        self._check(rows)
        length = len(self.rows)
        rows = rows[max(0, len(rows) - length) :]
        if len(rows):
            if self.rows.shape[1] == 0:
                self.rows = rows.new_zeros(length, rows.shape[1], dtype=self.rows.dtype)
            where = (self.pushed + torch.arange(len(rows), device=self.pushed.device)) % length
            self.rows[where] = rows.to(self.rows.dtype)
            self.pushed += len(rows)
            if self._count is not None:
                self._count += len(rows)

    def _check(self, rows: Tensor) -> None:
        if self.rows.shape[1] not in (0, rows.shape[1]):
            raise ValueError(f"the queue has {self.rows.shape[1]} dimensions, the embeddings have {rows.shape[1]}")

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        if self.rows.shape[1] == 0 and f"{prefix}rows" in state_dict:
            self.rows = torch.zeros_like(state_dict[f"{prefix}rows"], device=self.rows.device)
        self._count = None
        super()._load_from_state_dict(state_dict, prefix, *rest)
