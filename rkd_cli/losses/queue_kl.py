"""Distillation of similarities to a queue of teacher embeddings."""

from __future__ import annotations

from torch import Tensor, nn

from rkd_cli.losses.teacher_space import TeacherQueue, softmax_divergence, unit_pair


class QueueKL(nn.Module):
    """KL divergence between the similarities of teacher and student to a queue of teacher embeddings.

    With cosines to the rows k of the queue, the mean over the images of

        KL(softmax_k(teacher . k / T) || softmax_k(student . k / T)).

    Its minimum, 0, is at student = teacher. In training mode a batch's teacher embeddings are pushed before its loss,
    so each image is in the queue itself. In evaluation mode the queue does not change.

    This is the similarity distillation of SEED (Fang et al., ICLR 2021; arXiv 2101.04731) with one temperature for both
    networks and without random rows in a queue that is not full. The defaults are those of LightlyTrain's
    ``distillationv1`` for 4,000 to 10,000 images. That method has the same divergence, but trains on mixup
    (``rkd distill --mixup 1``), adds a linear layer to the student, and counts the zeros of a queue that is not full.

    Args:
        temperature: T.
        queue_size: number of rows in the queue, at least 1.
        size: D; by default that of the first batch.
    Raises:
        ValueError: a queue of no rows.
    """

    def __init__(self, temperature: float = 0.07, queue_size: int = 2048, size: int | None = None) -> None:
        super().__init__()
        if queue_size < 1:
            raise ValueError(f"queue_size must be at least 1, got {queue_size}")
        self.temperature = temperature
        self.queue = TeacherQueue(queue_size, size)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of one batch.

        Args:
            student: (N, D) embeddings.
            teacher: (N, D) embeddings; no gradient flows to them.
        Returns:
            () loss in the student's dtype; 0 while the queue has fewer than two rows.
        Raises:
            ValueError: N or D differ, or D is not the queue's.
        """
        learned, target = unit_pair(student, teacher)
        if self.training:
            self.queue.push(target)
        classes = self.queue.contents()  # (M, D)
        if len(classes) == 0:
            return student.sum() * 0
        logits = [rows @ classes.T / self.temperature for rows in (target, learned)]
        return softmax_divergence(*logits).to(student.dtype)
