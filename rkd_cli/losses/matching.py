"""Embedding matching: each student embedding at its teacher's place."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from rkd_cli.geometry import check_rows, unit_rows


class EmbeddingMatching(nn.Module):
    """Mean over the rows of 1 - cos(student, teacher), or of ||student - teacher||^2.

    The regression of Budnik and Avrithis (CVPR 2021; arXiv 2006.16331), "surprisingly effective" where the student
    queries the teacher's gallery; theirs is of cosines. The squared distance is the sum over the coordinates and
    normalizes nothing.

    Where the sizes differ, ``projection``, learned beside the student, takes its place: without a bias, and orthogonal
    at the start, so that it keeps distances (or projects, to a smaller teacher). What queries the teacher's gallery is
    then ``projection(student)``. It is None where the sizes are equal.

    Args:
        kind: "cosine" or "squared".
        student_size: Ds; without the sizes there is no projection.
        teacher_size: Dt.
    Raises:
        ValueError: no such kind, or one size without the other.
    """

    def __init__(
        self,
        kind: Literal["cosine", "squared"] = "cosine",
        student_size: int | None = None,
        teacher_size: int | None = None,
    ) -> None:
        super().__init__()
        if kind not in ("cosine", "squared"):
            raise ValueError(f"embedding matching knows no kind {kind!r}: take 'cosine' or 'squared'")
        self.kind = kind
        self.projection: nn.Linear | None = None
        if (student_size is None) != (teacher_size is None):
            raise ValueError("a projection needs both sizes, the student's and the teacher's")
        if student_size is not None and teacher_size is not None and student_size != teacher_size:
            self.projection = nn.Linear(student_size, teacher_size, bias=False)
            nn.init.orthogonal_(self.projection.weight)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of one batch.

        Args:
            student: (N, Ds) embeddings.
            teacher: (N, Dt) embeddings; no gradient flows to them.
        Returns:
            () loss in the student's type. A row of zeros, of either, has cosine 0 and costs 1; it passes no gradient.
        Raises:
            ValueError: not embeddings of the same N images, or the student, projected if there is a projection, is not
                as wide as the teacher.
        """
        check_rows(student, teacher, same_size=self.projection is None)
        learned, target = student.double(), teacher.detach().double()
        if self.projection is not None:
            sizes = self.projection.in_features, self.projection.out_features
            if (student.shape[1], teacher.shape[1]) != sizes:
                raise ValueError(
                    f"need embeddings of {sizes[0]} and {sizes[1]} dimensions, as the projection, got "
                    f"{tuple(student.shape)} and {tuple(teacher.shape)}"
                )
            learned = learned @ self.projection.weight.double().T  # float64 is safe from autocast and TF32
        if self.kind == "squared":
            return (learned - target).square().sum(dim=1).mean().to(student.dtype)
        return (1 - (unit_rows(learned) * unit_rows(target)).sum(dim=1)).mean().to(student.dtype)
