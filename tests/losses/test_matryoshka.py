"""The mean over prefixes, of losses of labels, of relations and of the teacher's space."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rkd_cli.losses import EmbeddingMatching, Matryoshka, QueueKL, RKDAngle, RKDDistance, TripletLoss
from rkd_cli.mining import AllPairs

LABELS = torch.tensor([0, 0, 0, 1, 1, 2, 2])


def rows(size: int = 6, requires_grad: bool = False) -> Tensor:
    return torch.randn(7, size, dtype=torch.float64, requires_grad=requires_grad)


@pytest.mark.parametrize("dims", [(2, 4), (2, 4, 6), (6,), (1, 5)])
@pytest.mark.parametrize("renormalize", [False, True])
def test_relations_of_prefixes_are_those_of_the_whole_teacher(dims: tuple[int, ...], renormalize: bool) -> None:
    student, teacher = rows(), rows(9)
    expected, lengths = 0.0, sorted({*dims, 6})
    for length in lengths:
        prefix = student[:, :length]
        expected += RKDAngle()(F.normalize(prefix, dim=1) if renormalize else prefix, teacher).item() / len(lengths)
    loss = Matryoshka(RKDAngle(), dims, truncate_teacher=False, renormalize=renormalize)
    assert loss(student, teacher).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("renormalize", [False, True])
def test_a_truncated_teacher_is_cut_as_the_student_is(renormalize: bool) -> None:
    student, teacher = rows(), rows()
    expected = 0.0
    for length in (2, 4, 6):
        for s, t in zip(student[:, :length], teacher[:, :length], strict=True):
            if renormalize:
                s, t = s / s.square().sum().sqrt(), t / t.square().sum().sqrt()
            expected += sum(float(a - b) ** 2 for a, b in zip(s, t, strict=True)) / 21
    loss = Matryoshka(EmbeddingMatching("squared", 6, 6), (2, 4), truncate_teacher=True, renormalize=renormalize)
    assert loss(student, teacher).item() == pytest.approx(expected, rel=1e-12)


def test_labels_are_never_cut() -> None:
    student = rows()
    triplet = TripletLoss(2, 0.2, AllPairs())
    expected = sum(triplet(student[:, :length], LABELS).item() for length in (3, 6)) / 2
    loss = Matryoshka(triplet, (3,), truncate_teacher=False, renormalize=False)
    assert loss(student, LABELS).item() == pytest.approx(expected, rel=1e-12)


def test_gradient_equals_finite_differences_and_spares_the_teacher() -> None:
    student, teacher = rows(requires_grad=True), rows(requires_grad=True)
    for cut in (False, True):
        loss = Matryoshka(RKDDistance(), (2, 3), truncate_teacher=cut, renormalize=True)
        fixed = teacher.detach()
        assert torch.autograd.gradcheck(lambda x, loss=loss, fixed=fixed: loss(x, fixed), student)
        loss(student, teacher).backward()
        assert teacher.grad is None


def test_a_loss_for_each_prefix_keeps_its_own_state() -> None:
    projections = nn.ModuleList(EmbeddingMatching("squared", length, 5) for length in (2, 4, 6)).double()
    student, teacher = rows(requires_grad=True), rows(5)
    loss = Matryoshka(projections, (2, 4), truncate_teacher=False, renormalize=False)
    expected = sum(one(student[:, :d], teacher) for one, d in zip(projections, (2, 4, 6), strict=True)) / 3
    torch.testing.assert_close(loss(student, teacher), expected)
    assert len(list(loss.parameters())) == 3

    queues = nn.ModuleList(QueueKL(0.1, 20, length) for length in (2, 6))
    loss = Matryoshka(queues, (2,), truncate_teacher=True, renormalize=False)
    total = loss(student, rows()) + loss(student, rows())
    total.backward()
    assert {name: tuple(value.shape) for name, value in loss.state_dict().items()} == {
        "loss.0.queue.rows": (20, 2),
        "loss.0.queue.pushed": (),
        "loss.1.queue.rows": (20, 6),
        "loss.1.queue.pushed": (),
    }


def test_one_queue_does_not_serve_two_lengths() -> None:
    with pytest.raises(ValueError, match="the queue has 6 dimensions, the embeddings have 2"):
        Matryoshka(QueueKL(0.1, 20, 6), (2,), truncate_teacher=True, renormalize=False)(rows(), rows())


@pytest.mark.parametrize("dims", [(), (0, 2), (4, 2), (2, 2)])
def test_lengths_that_do_not_rise_are_refused(dims: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="prefix sizes must ascend from 1 or more"):
        Matryoshka(RKDDistance(), dims, truncate_teacher=False, renormalize=False)


def test_lengths_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match="a prefix has 8 dimensions, the embeddings have only 6"):
        Matryoshka(RKDDistance(), (2, 8), truncate_teacher=False, renormalize=False)(rows(), rows())
    few = nn.ModuleList([RKDDistance()])
    with pytest.raises(ValueError, match="need one loss for each of the prefixes 2, 6, got 1"):
        Matryoshka(few, (2,), truncate_teacher=False, renormalize=False)(rows(), rows())


def test_a_prefix_of_zeros_stays_finite() -> None:
    student, teacher = rows(), rows()
    student[:, :2] = 0
    student.requires_grad_()
    for loss in (RKDDistance(), RKDAngle(), EmbeddingMatching("cosine", 6, 6)):
        value = Matryoshka(loss, (2,), truncate_teacher=True, renormalize=True)(student, teacher)
        (gradient,) = torch.autograd.grad(value, student)
        assert torch.isfinite(value)
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("renormalize", [False, True])
def test_half_precision_is_rounded_once_at_the_end(renormalize: bool) -> None:
    loss = Matryoshka(EmbeddingMatching("squared", 6, 6), (2,), truncate_teacher=True, renormalize=renormalize)
    for _ in range(20):
        student, teacher = rows().bfloat16(), rows().bfloat16()
        value = loss(student, teacher)
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, loss(student.float(), teacher.float()).bfloat16())
