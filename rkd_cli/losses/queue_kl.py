"""Similarities to a queue of teacher embeddings, as soft labels."""

from __future__ import annotations

from torch import Tensor, nn

from rkd_cli.losses.teacher_space import TeacherQueue, softmax_divergence, unit_pair


class QueueKL(nn.Module):
    """KL divergence between the similarities of teacher and student to a queue of teacher embeddings.

    Over the rows k of the queue, with cosines, the mean over the images of

        KL(softmax_k(teacher . k / T) || softmax_k(student . k / T)).

    Its minimum, 0, is at the teacher. In training mode a batch's teacher embeddings are pushed before its loss is
    taken, so that each image finds itself in the queue; in evaluation mode the queue stays as it is.

    This is the similarity distillation of SEED (Fang et al., ICLR 2021; arXiv 2101.04731) with one temperature for both
    networks and no random rows in a queue that is not full. LightlyTrain's ``distillationv1`` has the same divergence,
    but is another method: it trains on blends of two images (mixup), puts a linear layer behind the student, and counts
    the zeros of a queue that is not full as rows. Its temperature is the default here, and so is its queue for 4,000 to
    10,000 images. ``rkd distill --mixup 1`` blends images alike; a student of another size needs a layer of its own.

    Args:
        temperature: T.
        queue_size: number of rows in the queue.
        size: D; without it, that of the first batch.
    Raises:
        ValueError: a queue of no rows, from which nothing could be learned.
    """

    def __init__(self, temperature: float = 0.07, queue_size: int = 2048, size: int | None = None) -> None:
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
            ValueError: not embeddings of the same N images, sizes that differ, or are not the queue's.
        """
        learned, target = unit_pair(student, teacher)
        if self.training:
            self.queue.push(target)
        classes = self.queue.contents()  # (M, D)
        if len(classes) == 0:
            return student.sum() * 0
        logits = [rows @ classes.T / self.temperature for rows in (target, learned)]
        return softmax_divergence(*logits).to(student.dtype)
