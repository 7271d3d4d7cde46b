"""Contextual similarity distillation."""

from __future__ import annotations

from torch import Tensor, nn

from rkd_cli.losses.teacher_space import TeacherQueue, softmax_divergence, unit_pair


class ContextualSimilarity(nn.Module):
    """Contextual similarity distillation, CSD (Wu, Wang, Zhou, Li, Tian; CVPR 2022).

    An image's context is its own teacher embedding g_0 and those of its K nearest neighbors g_1 .. g_K in the teacher's
    gallery. With cosines, for student embedding q and teacher embedding g of the image, the loss is the mean of

        KL(softmax_k(g . g_k / teacher_temperature) || softmax_k(q . g_k / student_temperature)),   k = 0 .. K.

    g_0 keeps the embedding itself (first order), the others keep the ranking (second order): one term does both.
    Equal temperatures put the minimum, 0, at q = g; a smaller teacher temperature asks for more contrast than the
    teacher has.

    The authors published no code. The defaults are those of every configuration of the D3still authors' implementation
    (https://github.com/SCY-X/D3still, ``AIR_Distiller/distillers/CSD.py``): temperatures 1 and 0.01, and 256 rows, the
    image itself among them, so that K is 255. There the loss has a weight of 5 to 20.

    The paper ranks the whole training set, embedded once, and that implementation ranks the batch. Here the gallery is
    the batch and a queue of past batches; each batch is pushed after its loss, in training mode only. Past views of an
    image may be among its neighbors.

    Args:
        student_temperature: of the student's softmax.
        teacher_temperature: of the teacher's softmax.
        neighbors: K; a smaller gallery gives all of its rows.
        queue_size: number of past teacher embeddings in the gallery; 0 takes the batch alone.
        size: D; without it, that of the first batch.
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
            () loss in the student's type; 0 where the gallery is one row.
        Raises:
            ValueError: not embeddings of the same N images, sizes that differ, or are not the queue's.
        """
        query, target = unit_pair(student, teacher)
        gallery = self.queue.behind(target)  # (M, D)
        similarities = target @ gallery.T  # (N, M)
        # nothing is nearer to an image than itself: g_0 is among these, or a duplicate, which is the same
        context = similarities.topk(min(self.neighbors + 1, len(gallery))).indices
        loss = softmax_divergence(
            similarities.gather(1, context) / self.teacher_temperature,
            (query @ gallery.T).gather(1, context) / self.student_temperature,
        )
        if self.training:
            self.queue.push(target)
        return loss.to(student.dtype)
