"""Embedding matching: regression of the teacher's embeddings."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from rkd_cli.geometry import check_rows, unit_rows


class EmbeddingMatching(nn.Module):
    """Mean over the rows of 1 - cos(student, teacher), or of ||student - teacher||^2.

    The regression of Budnik and Avrithis (CVPR 2021; arXiv 2006.16331), for a student that queries the teacher's
    gallery; they use cosines. The squared distance is summed over the dimensions of embeddings as given.

    If the sizes differ, ``projection`` (linear, no bias, trained with the student) maps Ds to Dt, and
    ``projection(student)`` is what queries the teacher's gallery. Its orthogonal initialization preserves distances if
    Ds <= Dt. It is None if the sizes are equal.

    Args:
        kind: "cosine" or "squared".
        student_size: Ds; give both sizes or neither.
        teacher_size: Dt.
    Raises:
        ValueError: an unknown kind, or one size without the other.
    """

    def __init__(
        self,
        kind: Literal["cosine", "squared"] = "cosine",
        student_size: int | None = None,
        teacher_size: int | None = None,
    ) -> None:
        super().__init__()
        if kind not in ("cosine", "squared"):
            raise ValueError(f"kind must be 'cosine' or 'squared', got {kind!r}")
        self.kind = kind
        self.projection: nn.Linear | None = None
        if (student_size is None) != (teacher_size is None):
            raise ValueError("give both student_size and teacher_size, or neither")
        if student_size is not None and teacher_size is not None and student_size != teacher_size:
            self.projection = nn.Linear(student_size, teacher_size, bias=False)
            nn.init.orthogonal_(self.projection.weight)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of one batch.

        Args:
            student: (N, Ds) embeddings.
            teacher: (N, Dt) embeddings; no gradient flows to them.
        Returns:
            () loss in the student's dtype. A row of zeros has cosine 0, costs 1 and has no gradient.
        Raises:
            ValueError: N differs, or Ds and Dt are not the sizes of the projection (equal without one).
        """
        check_rows(student, teacher, same_size=self.projection is None)
        learned, target = student.double(), teacher.detach().double()
        if self.projection is not None:
            sizes = self.projection.in_features, self.projection.out_features
            if (student.shape[1], teacher.shape[1]) != sizes:
                raise ValueError(
                    f"need embeddings of {sizes[0]} and {sizes[1]} dimensions for this projection, got "
                    f"{tuple(student.shape)} and {tuple(teacher.shape)}"
                )
            learned = learned @ self.projection.weight.double().T  # float64: no autocast, no TF32
        if self.kind == "squared":
            return (learned - target).square().sum(dim=1).mean().to(student.dtype)
        return (1 - (unit_rows(learned) * unit_rows(target)).sum(dim=1)).mean().to(student.dtype)
