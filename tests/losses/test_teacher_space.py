"""Losses of a student in the teacher's space against loops, finite differences, and what their queues must keep."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rkd_cli.losses import ContextualSimilarity, D3still, EmbeddingMatching, QueueKL
from rkd_cli.losses import d3still as d3still_module
from rkd_cli.losses.teacher_space import TeacherQueue

DTYPES = [torch.float32, torch.float64]
Rows = list[list[float]]


def cosine(u: list[float], v: list[float]) -> float:
    lengths = math.hypot(*u) * math.hypot(*v)
    return sum(a * b for a, b in zip(u, v, strict=True)) / lengths if lengths else 0.0


def divergence(p_logits: list[float], q_logits: list[float]) -> float:
    p, q = ([math.exp(v) / sum(math.exp(w) for w in logits) for v in logits] for logits in (p_logits, q_logits))
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def nearest_others(teacher: Rows, past: Rows, i: int, count: int) -> Rows:
    """The gallery's rows by falling cosine to teacher row i, that row itself left out."""
    others = [row for j, row in enumerate([*teacher, *past]) if j != i]
    return sorted(others, key=lambda row: -cosine(teacher[i], row))[:count]


def slow_cosine(student: Rows, teacher: Rows) -> float:
    return sum(1 - cosine(s, t) for s, t in zip(student, teacher, strict=True)) / len(student)


def slow_squared(student: Rows, teacher: Rows) -> float:
    return sum(math.dist(s, t) ** 2 for s, t in zip(student, teacher, strict=True)) / len(student)


def slow_contextual(student: Rows, teacher: Rows, past: Rows, ts: float, tt: float, k: int) -> float:
    total = 0.0
    for i, (s, t) in enumerate(zip(student, teacher, strict=True)):
        context = [t, *nearest_others(teacher, past, i, k)]
        total += divergence([cosine(t, g) / tt for g in context], [cosine(s, g) / ts for g in context])
    return total / len(student)


def slow_queue(student: Rows, teacher: Rows, queue: Rows, temperature: float) -> float:
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        total += divergence([cosine(t, g) / temperature for g in queue], [cosine(s, g) / temperature for g in queue])
    return total / len(student)


def slow_d3still(student: Rows, teacher: Rows, past: Rows, k: int, weights: tuple[float, float, float]) -> float:
    n, apart, turn, keep = len(student), 0.0, 0.0, 0.0
    for i, (s, t) in enumerate(zip(student, teacher, strict=True)):
        apart += (cosine(t, t) - cosine(s, t)) ** 2
        near = nearest_others(teacher, past, i, k)
        wrong = right = 0.0
        for a in near:
            for b in near:
                learned, target = cosine(s, a) - cosine(s, b), cosine(t, a) - cosine(t, b)
                square = ((learned - target) / (0.1 + abs(target))) ** 2
                if learned * target < 0:
                    wrong += square
                elif learned * target > 0:
                    right += square
        turn += math.sqrt(wrong) / max(1, len(near))
        keep += math.sqrt(right) / max(1, len(near))
    return weights[0] * math.sqrt(apart) / n + weights[1] * turn / n + weights[2] * keep / n


# loss of queue length Q and size 4, and the loop of (student, teacher, past): what the queue held before the batch
Slow = Callable[[Rows, Rows, Rows], float]
CASES: dict[str, tuple[Callable[[int], nn.Module], Slow]] = {
    "cosine": (lambda q: EmbeddingMatching("cosine", 4, 4), lambda s, t, past: slow_cosine(s, t)),
    "squared": (lambda q: EmbeddingMatching("squared", 4, 4), lambda s, t, past: slow_squared(s, t)),
    "contextual": (
        lambda q: ContextualSimilarity(0.5, 0.2, 3, q, 4),
        lambda s, t, past: slow_contextual(s, t, past, 0.5, 0.2, 3),
    ),
    "contextual all": (
        lambda q: ContextualSimilarity(0.1, 0.1, 100, q, 4),
        lambda s, t, past: slow_contextual(s, t, past, 0.1, 0.1, 100),
    ),
    "queue": (lambda q: QueueKL(0.2, max(q, 50), 4), lambda s, t, past: slow_queue(s, t, past + t, 0.2)),
    "d3still": (
        lambda q: D3still(4, 2, 3, 0.5, q, 4),
        lambda s, t, past: slow_d3still(s, t, past, 4, (2, 3, 0.5)),
    ),
    "d3still all": (
        lambda q: D3still(100, 5, 1, 7, q, 4),
        lambda s, t, past: slow_d3still(s, t, past, 100, (5, 1, 7)),
    ),
}
QUEUED = ["contextual", "queue", "d3still"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 9])
@pytest.mark.parametrize("queue", [0, 50])
def test_equals_the_loop_batch_after_batch(case: str, dtype: torch.dtype, n: int, queue: int) -> None:
    make, slow = CASES[case]
    loss = make(queue).to(dtype)
    past: Rows = []
    for _ in range(3):
        student, teacher = torch.randn(n, 4, dtype=dtype), torch.randn(n, 4, dtype=dtype)
        value = loss(student, teacher)
        assert value.dtype == dtype
        expected = slow(student.tolist(), teacher.tolist(), past)
        assert value.item() == pytest.approx(expected, rel=1e-5 if dtype == torch.float32 else 1e-10, abs=1e-6)
        if queue or case == "queue":
            past = past + teacher.tolist()


@pytest.mark.parametrize("case", CASES)
def test_gradient_equals_finite_differences(case: str) -> None:
    loss = CASES[case][0](50).double()
    loss(torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64))  # so that there is a past
    loss.eval()
    student = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(6, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: loss(x, teacher), student)


@pytest.mark.parametrize("case", CASES)
def test_no_gradient_flows_to_the_teacher(case: str) -> None:
    student = torch.randn(6, 4, requires_grad=True)
    teacher = torch.randn(6, 4, requires_grad=True)
    CASES[case][0](50)(student, teacher).backward()
    assert student.grad is not None
    assert teacher.grad is None


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_teacher_itself_costs_nothing_where_temperatures_are_equal(case: str, dtype: torch.dtype) -> None:
    loss = CASES[case][0](50)
    teacher = torch.randn(6, 4, dtype=dtype)
    student = teacher.clone().requires_grad_()
    value = loss(student, teacher)
    (gradient,) = torch.autograd.grad(value, student)
    if case == "contextual":  # its teacher has the smaller temperature
        assert value > 0.1
    else:
        assert value.abs() < 1e-7
        assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("whose", ["student", "teacher", "both"])
def test_identical_and_zero_rows_stay_finite(case: str, n: int, dtype: torch.dtype, value: float, whose: str) -> None:
    student, teacher = torch.randn(n, 4, dtype=dtype), torch.randn(n, 4, dtype=dtype)
    if whose != "teacher":
        student.fill_(value)
    if whose != "student":
        teacher.fill_(value)
    student.requires_grad_()
    loss = CASES[case][0](50)
    for _ in range(2):  # the second time duplicates are in the queue
        result = loss(student, teacher)
        (gradient,) = torch.autograd.grad(result, student)
        assert torch.isfinite(result)
        assert torch.isfinite(gradient).all()
        assert gradient.abs().max() < 1e3
        if value == 0 and whose != "teacher" and case != "squared":
            assert not gradient.any()


def test_a_row_of_zeros_costs_one_cosine() -> None:
    student, teacher = torch.randn(4, 3), torch.randn(4, 3)
    loss = EmbeddingMatching("cosine", 3, 3)
    student[0], teacher[1] = 0, 0
    expected = (2 + slow_cosine(student[2:].tolist(), teacher[2:].tolist()) * 2) / 4
    assert loss(student, teacher).item() == pytest.approx(expected, rel=1e-6)
    assert loss(student[:1], teacher[:1]).item() == loss(student[1:2], teacher[1:2]).item() == 1


@pytest.mark.parametrize("case", QUEUED)
def test_sizes_that_differ_are_named(case: str) -> None:
    loss = CASES[case][0](50)
    with pytest.raises(ValueError, match=r"equal N and D, .* got \(5, 3\) float32 and \(5, 4\)"):
        loss(torch.randn(5, 3), torch.randn(5, 4))
    with pytest.raises(ValueError, match="the queue has 4 dimensions, the embeddings have 5"):
        CASES["queue"][0](50)(torch.randn(5, 5), torch.randn(5, 5))
    with pytest.raises(ValueError, match=r"equal N and D, .* got \(5, 1\) float32 and \(5, 4\)"):
        EmbeddingMatching("squared", 4, 4)(torch.randn(5, 1), torch.randn(5, 4))


@pytest.mark.parametrize("kind", ["cosine", "squared"])
@pytest.mark.parametrize(("student_size", "teacher_size"), [(3, 5), (5, 3)])
def test_a_projection_is_orthogonal_drawn_from_the_seed_and_learned(
    kind: str, student_size: int, teacher_size: int
) -> None:
    torch.manual_seed(3)
    loss = EmbeddingMatching(kind, student_size, teacher_size).double()  # type: ignore[arg-type]
    torch.manual_seed(3)
    again = EmbeddingMatching(kind, student_size, teacher_size)  # type: ignore[arg-type]
    assert loss.projection is not None
    assert again.projection is not None
    weight = loss.projection.weight
    assert [name for name, _ in loss.named_parameters()] == ["projection.weight"]
    assert torch.equal(weight.detach().float(), again.projection.weight)
    gram = weight.T @ weight if teacher_size > student_size else weight @ weight.T
    torch.testing.assert_close(gram, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-6)

    student = torch.randn(6, student_size, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(6, teacher_size, dtype=torch.float64)
    projected = [[sum(w * v for w, v in zip(row, s, strict=True)) for row in weight.tolist()] for s in student.tolist()]
    slow = slow_cosine if kind == "cosine" else slow_squared
    assert loss(student, teacher).item() == pytest.approx(slow(projected, teacher.tolist()), rel=1e-12)
    assert torch.autograd.gradcheck(lambda x, w: loss(x, teacher), (student, weight))


def test_equal_sizes_need_no_projection_and_kinds_are_two() -> None:
    assert EmbeddingMatching("squared", 4, 4).projection is None
    with pytest.raises(ValueError, match="kind must be 'cosine' or 'squared', got 'manhattan'"):
        EmbeddingMatching("manhattan", 4, 4)  # type: ignore[arg-type]


@pytest.mark.parametrize("case", ["cosine", "contextual all", "queue", "d3still all"])
def test_rows_of_zeros_have_cosine_zero_to_all(case: str) -> None:
    make, slow = CASES[case]
    student, teacher = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    student[0], teacher[1], student[2], teacher[2] = 0, 0, 0, 0
    value = make(0).double()(student, teacher).item()
    assert value == pytest.approx(slow(student.tolist(), teacher.tolist(), []), rel=1e-10)


def test_a_tie_of_the_teacher_is_no_pair() -> None:
    """Two mirror images are equally near to the first row; whatever the student makes of them costs nothing."""
    teacher = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, -0.8]])
    student = torch.tensor([[0.6, 0.8], [0.0, 1.0], [0.3, 0.1]])
    for weights in ((0, 1, 0), (0, 0, 1), (1, 2, 3)):
        expected = slow_d3still(student.tolist(), teacher.tolist(), [], 2, weights)
        assert D3still(2, *weights, 0, 2)(student, teacher).item() == pytest.approx(expected, rel=1e-6, abs=1e-6)


def as_sets(rows: Tensor) -> set[float]:
    return {round(v, 5) for v in rows[:, 0].tolist()}


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 7, 12])
def test_the_queue_holds_the_last_rows(batch: int) -> None:
    queue, seen = TeacherQueue(5, 2), torch.empty(0, 2)
    assert queue.contents().shape == (0, 2)
    for _ in range(7):
        rows = torch.randn(batch, 2)
        queue.push(rows.clone().requires_grad_())
        seen = torch.cat([seen, rows])[-5:]
        assert len(queue.contents()) == len(seen)
        assert as_sets(queue.contents()) == as_sets(seen)
    assert not queue.contents().requires_grad


def test_a_queue_of_no_rows_takes_and_holds_none() -> None:
    queue = TeacherQueue(0, 2)
    queue.push(torch.randn(3, 2))
    assert queue.contents().shape == (0, 2)
    with pytest.raises(ValueError, match="queue_size must be at least 1, got 0"):
        QueueKL(0.07, 0, 4)


@pytest.mark.parametrize("case", QUEUED)
def test_evaluation_reads_the_queue_and_leaves_it(case: str) -> None:
    loss = CASES[case][0](50)
    loss(torch.randn(5, 4), torch.randn(5, 4))
    before = copy.deepcopy(loss.state_dict())
    student, teacher = torch.randn(6, 4), torch.randn(6, 4)
    first = loss.eval()(student, teacher)
    assert torch.equal(first, loss(student, teacher))
    assert all(torch.equal(before[name], value) for name, value in loss.state_dict().items())
    fresh = CASES[case][0](50).eval()(student, teacher)
    assert first != fresh  # the past has its part in it
    if case == "queue":
        assert fresh == 0  # nothing was ever pushed
        assert CASES[case][0](50).eval()(student * math.nan, teacher).isnan()


@pytest.mark.parametrize("case", QUEUED)
@pytest.mark.parametrize("length", [7, 50])
def test_a_state_dict_resumes_to_the_bit(case: str, length: int) -> None:
    torch.manual_seed(1)
    batches = [(torch.randn(5, 4), torch.randn(5, 4)) for _ in range(6)]
    straight, resumed = QueueKL(0.2, length, 4) if case == "queue" else CASES[case][0](length), CASES[case][0](length)
    if case == "queue":
        resumed = QueueKL(0.2, length, 4)
    for batch in batches[:3]:
        straight(*batch)
    assert set(straight.state_dict()) == {"queue.rows", "queue.pushed"}
    assert not list(straight.parameters())
    resumed.load_state_dict(copy.deepcopy(straight.state_dict()))
    for batch in batches[3:]:
        assert torch.equal(straight(*batch), resumed(*batch))
    assert all(torch.equal(a, b) for a, b in zip(straight.state_dict().values(), resumed.buffers(), strict=True))


@pytest.mark.parametrize("case", QUEUED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_two_losses_before_one_backward(case: str, dtype: torch.dtype) -> None:
    """The second push must not change what the first loss will be derived from."""
    student = torch.randn(6, 4, dtype=dtype, requires_grad=True)
    batches = [torch.randn(6, 4, dtype=dtype) for _ in range(2)]
    together, one_by_one = CASES[case][0](50).to(dtype), CASES[case][0](50).to(dtype)
    (gradient,) = torch.autograd.grad(together(student, batches[0]) + together(student, batches[1]), student)
    parts = [torch.autograd.grad(one_by_one(student, teacher), student)[0] for teacher in batches]
    torch.testing.assert_close(gradient, parts[0] + parts[1], rtol=1e-6, atol=1e-7)


def test_pairs_in_blocks_are_the_pairs_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    student = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(9, 4, dtype=torch.float64)
    results = []
    for elements in (1, 2 * 25, 1 << 20):
        monkeypatch.setattr(d3still_module, "_PAIR_ELEMENTS", elements)
        value = D3still(5, 2, 3, 0.5, 0, 4)(student, teacher)
        results.append((value, *torch.autograd.grad(value, student)))
    for found in results[1:]:
        torch.testing.assert_close(found, results[0], rtol=1e-12, atol=1e-12)


def test_the_queue_has_the_gradient_of_seed() -> None:
    """SEED (arXiv 2101.04731): the cross-entropy of the two softmaxes, which differs by the teacher's entropy alone."""
    x, y, past = torch.randn(5, 4, requires_grad=True), torch.randn(5, 4), torch.randn(6, 4)
    loss = QueueKL(0.2, 20, 4)
    loss.queue.push(F.normalize(past.double(), dim=1))
    (gradient,) = torch.autograd.grad(loss(x, y), x)
    rows = F.normalize(torch.cat([past, y]).double(), dim=1)
    p = (F.normalize(y.double(), dim=1) @ rows.T / 0.2).softmax(dim=1)
    q = (F.normalize(x.double(), dim=1) @ rows.T / 0.2).log_softmax(dim=1)
    (expected,) = torch.autograd.grad(-(p * q).sum(dim=1).mean(), x)
    torch.testing.assert_close(gradient, expected)
