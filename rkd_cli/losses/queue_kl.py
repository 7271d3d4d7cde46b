"""Distillation through a queue of teacher embeddings."""

from __future__ import annotations

from torch import Tensor, nn

from rkd_cli.losses.teacher_space import TeacherQueue, softmax_divergence, unit_pair


class QueueKL(nn.Module):
    """KL divergence of student and teacher as both see a queue of teacher embeddings.

    The rows k of the queue serve as the weights of a classifier that nobody trained. With cosines, the mean over the
    images of

        KL(softmax_k(teacher . k / T) || softmax_k(student . k / T)),

    as the documentation of LightlyTrain's first distillation method describes it. Its minimum, 0, is at the teacher.

    In training mode a batch's teacher embeddings are pushed before its loss is taken, so that the first batch sees
    itself; in evaluation mode the queue stays as it is.

    Args:
        temperature: T.
        queue_size: rows of the queue.
        size: D.
    Raises:
        ValueError: a queue of no rows, from which nothing could be learned.
    """

    def __init__(self, temperature: float, queue_size: int, size: int) -> None:
        super().__init__()
        if queue_size < 1:
            raise ValueError(f"a queue of {queue_size} embeddings teaches nothing: take 1 at least")
        self.temperature = temperature
        self.queue = TeacherQueue(queue_size, size)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of one batch.

        Args:
            student: (N, D) embeddings.
            teacher: (N, D) embeddings; no gradient flows to them.
        Returns:
            () loss in the student's type; 0 while the queue holds fewer than two rows.
        Raises:
            ValueError: the sizes differ, or are not the queue's.
        """
        learned, target = unit_pair(student, teacher)
        if self.training:
            self.queue.push(target)
        classes = self.queue.contents()  # (M, D)
        if len(classes) == 0:
            return student.sum() * 0
        logits = [rows @ classes.T / self.temperature for rows in (target, learned)]
        return softmax_divergence(*logits).to(student.dtype)
