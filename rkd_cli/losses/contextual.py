"""Contextual similarity distillation."""

from __future__ import annotations

from torch import Tensor, nn

from rkd_cli.losses.teacher_space import TeacherQueue, softmax_divergence, unit_pair


class ContextualSimilarity(nn.Module):
    """Contextual similarity distillation, CSD (Wu, Wang, Zhou, Li, Tian; CVPR 2022).

    An image's context is its own teacher embedding g_0 and its K nearest neighbors g_1 .. g_K in the teacher's
    gallery. For student embedding q and teacher embedding g of the image, and with cosines, the loss is the mean of

        KL(softmax_k(g . g_k / teacher_temperature) || softmax_k(q . g_k / student_temperature)),   k = 0 .. K.

    g_0 preserves the embedding itself (first order), the others preserve the ranking (second order). With equal
    temperatures the minimum, 0, is at q = g. A smaller teacher temperature asks for more contrast than the teacher has.

    The authors published no code. The defaults come from the D3still authors' implementation
    (https://github.com/SCY-X/D3still, ``AIR_Distiller/distillers/CSD.py``): temperatures 1 and 0.01, and 256 rows
    including the image itself, so K is 255. They weight the loss by 5 to 20.

    The paper ranks the whole training set, embedded once; the D3still implementation ranks the batch. Here the gallery
    is the batch and a queue of past batches. Each batch is pushed after its loss, in training mode only. Past views of
    an image may be among its neighbors.

    Args:
        student_temperature: divides the student's cosines.
        teacher_temperature: divides the teacher's cosines.
        neighbors: K; a smaller gallery is used whole.
        queue_size: number of past teacher embeddings in the gallery; 0 for the batch alone.
        size: D; by default that of the first batch.
    """

    def __init__(
        self,
        student_temperature: float = 1.0,
        teacher_temperature: float = 0.01,
        neighbors: int = 255,
        queue_size: int = 2048,
        size: int | None = None,
    ) -> None:
        super().__init__()
        self.student_temperature, self.teacher_temperature = student_temperature, teacher_temperature
        self.neighbors = neighbors
        self.queue = TeacherQueue(queue_size, size)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of one batch.

        Args:
            student: (N, D) embeddings.
            teacher: (N, D) embeddings; no gradient flows to them.
        Returns:
            () loss in the student's dtype; 0 if the gallery has one row.
        Raises:
            ValueError: N or D differ, or D is not the queue's.
        """
        query, target = unit_pair(student, teacher)
        gallery = self.queue.behind(target)  # (M, D)
        similarities = target @ gallery.T  # (N, M)
        # an image is nearest to itself, so these include g_0 or an equal duplicate
        context = similarities.topk(min(self.neighbors + 1, len(gallery))).indices
        loss = softmax_divergence(
            similarities.gather(1, context) / self.teacher_temperature,
            (query @ gallery.T).gather(1, context) / self.student_temperature,
        )
        if self.training:
            self.queue.push(target)
        return loss.to(student.dtype)
