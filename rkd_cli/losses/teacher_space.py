"""What the losses of a student in the teacher's own space stand on: the pair's cosines, and past teacher embeddings."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rkd_cli.geometry import check_rows, unit_rows


def unit_pair(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both networks' embeddings of one batch at unit length.

    Args:
        student: (N, D), any floating type.
        teacher: (N, D), likewise.
    Returns:
        (N, D) float64 twice; the teacher's without gradient.
    Raises:
        ValueError: the two are not embeddings of the same N images, in the same number of dimensions.
    """
    check_rows(student, teacher, same_size=True)
    return unit_rows(student), unit_rows(teacher.detach())


def softmax_divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """Mean over the rows of KL(softmax(teacher) || softmax(student)).

    Args:
        teacher: (N, M) logits.
        student: (N, M) logits.
    Returns:
        () divergence: 0 where the two are equal, positive elsewhere.
    """
    return F.kl_div(student.log_softmax(dim=1), teacher.log_softmax(dim=1), reduction="batchmean", log_target=True)


class TeacherQueue(nn.Module):
    """The last teacher embeddings, first in, first out; buffers, so that a state dict resumes it to the bit.

    Args:
        length: how many rows it holds; 0 holds none.
        size: D; without it, that of the first rows pushed or loaded.
    """

    rows: Tensor  # (length, D) float32: a ring
    pushed: Tensor  # () int64: how many rows were ever stored

    def __init__(self, length: int, size: int | None = None) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(length, size or 0))
        self.register_buffer("pushed", torch.zeros((), dtype=torch.int64))

    def contents(self) -> Tensor:
        """The rows stored so far, in no particular order.

        Returns:
            (M, D) float64, M up to ``length``: a copy, which a later push leaves as autograd saved it.
        """
        stored = min(int(self.pushed), len(self.rows)) if len(self.rows) else 0  # a sync on CUDA
        return self.rows[:stored].to(torch.float64, copy=True)

    def behind(self, batch: Tensor) -> Tensor:
        """A batch's own rows, then those stored so far.

        Args:
            batch: (N, D) float64.
        Returns:
            (N + M, D) float64.
        Raises:
            ValueError: D is not the queue's.
        """
        self._check(batch)
        stored = self.contents()
        return torch.cat([batch, stored]) if len(stored) else batch

    @torch.no_grad()
    def push(self, rows: Tensor) -> None:
        """Store rows in place of the oldest.

        Args:
            rows: (N, D); of more than ``length`` the last are stored.
        Raises:
            ValueError: D is not the queue's.
        """
        self._check(rows)
        length = len(self.rows)
        rows = rows[max(0, len(rows) - length) :]
        if len(rows):
            if self.rows.shape[1] == 0:
                self.rows = rows.new_zeros(length, rows.shape[1], dtype=self.rows.dtype)
            where = (self.pushed + torch.arange(len(rows), device=self.pushed.device)) % length
            self.rows[where] = rows.to(self.rows.dtype)
            self.pushed += len(rows)

    def _check(self, rows: Tensor) -> None:
        if self.rows.shape[1] not in (0, rows.shape[1]):
            raise ValueError(f"embeddings of {rows.shape[1]} dimensions for a queue of {self.rows.shape[1]}")

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        if self.rows.shape[1] == 0 and f"{prefix}rows" in state_dict:
            self.rows = torch.zeros_like(state_dict[f"{prefix}rows"], device=self.rows.device)
        super()._load_from_state_dict(state_dict, prefix, *rest)
