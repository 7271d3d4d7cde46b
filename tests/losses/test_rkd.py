"""RKD-D and RKD-A against a loop over pairs and triples, the reference values, and finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from largest import LargestTensor
from rkd_cli.bench import textbook
from rkd_cli.losses import RKDAngle, RKDDistance
from rkd_cli.losses import rkd as rkd_module
from simulated_gpu import CUDA, SimulatedGpu

DTYPES = [torch.float32, torch.float64]


def huber(error: float) -> float:
    return error * error / 2 if abs(error) < 1 else abs(error) - 0.5


def slow_distance_loss(student: Tensor, teacher: Tensor) -> float:
    def relative(rows: list[list[float]]) -> list[float]:
        distances = [math.dist(a, b) for a in rows for b in rows]
        positive = [d for d in distances if d > 0]
        mean = sum(positive) / len(positive)
        return [d / mean for d in distances]

    pairs = zip(relative(student.tolist()), relative(teacher.tolist()), strict=True)
    errors = [huber(s - t) for s, t in pairs]
    return sum(errors) / len(errors)


def slow_angle_loss(student: Tensor, teacher: Tensor) -> float:
    def cosines(rows: list[list[float]]) -> list[float]:
        def cosine(i: int, j: int, k: int) -> float:
            u = [a - b for a, b in zip(rows[j], rows[i], strict=True)]
            v = [a - b for a, b in zip(rows[k], rows[i], strict=True)]
            lengths = math.hypot(*u) * math.hypot(*v)
            return sum(a * b for a, b in zip(u, v, strict=True)) / lengths if lengths else 0.0

        n = range(len(rows))
        return [cosine(i, j, k) for i in n for j in n for k in n]

    pairs = zip(cosines(student.tolist()), cosines(teacher.tolist()), strict=True)
    errors = [huber(s - t) for s, t in pairs]
    return sum(errors) / len(errors)


Slow = Callable[[Tensor, Tensor], float]
CASES: list[tuple[torch.nn.Module, Slow]] = [(RKDDistance(), slow_distance_loss), (RKDAngle(), slow_angle_loss)]
IDS = ["distance", "angle"]


@pytest.mark.parametrize(("loss", "slow"), CASES, ids=IDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [2, 3, 9])
def test_equals_the_loop(loss: torch.nn.Module, slow: Slow, dtype: torch.dtype, n: int) -> None:
    student, teacher = torch.randn(n, 4, dtype=dtype), 3 * torch.randn(n, 6, dtype=dtype)
    result = loss(student, teacher)
    assert result.dtype == dtype
    assert result.item() == pytest.approx(slow(student.double(), teacher.double()), rel=1e-5, abs=1e-9)


def gradient(loss: Any, student: Tensor, teacher: Tensor) -> Tensor:
    student = student.detach().clone().requires_grad_()
    (found,) = torch.autograd.grad(loss(student, teacher), student)
    return found


@pytest.mark.parametrize("n", [15, 16, 17, 100, 131])  # the last two take several blocks of rows and of vertices
def test_angles_of_many_blocks_equal_the_textbook(n: int) -> None:
    student, teacher = torch.randn(n, 4, dtype=torch.float64), torch.randn(n, 6, dtype=torch.float64)
    expected = textbook.angle_loss(student, teacher).item()
    assert RKDAngle()(student, teacher).item() == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(
        gradient(RKDAngle(), student, teacher), gradient(textbook.angle_loss, student, teacher), rtol=1e-9, atol=1e-15
    )


def subtracted_distance_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """The textbook's takes a Gram matrix, and so loses close pairs even in float64."""

    def relative(x: Tensor) -> Tensor:
        distances: Tensor = torch.linalg.vector_norm(x[:, None] - x, dim=2)
        return distances / distances[distances > 0].mean()

    return F.smooth_l1_loss(relative(student), relative(teacher))


FORMULAS = [(RKDDistance(), subtracted_distance_loss), (RKDAngle(), textbook.angle_loss)]


@pytest.mark.parametrize(("loss", "formula"), FORMULAS, ids=IDS)
@pytest.mark.parametrize("gap", [1e-2, 1e-3, 1e-4, 1e-5])
def test_rows_that_nearly_coincide_keep_their_gradient(loss: torch.nn.Module, formula: Any, gap: float) -> None:
    student, teacher, step = torch.randn(64, 16), torch.randn(64, 32), torch.randn(16)
    student[1] = student[0] + gap * step / step.norm()
    expected = gradient(formula, student.double(), teacher.double())
    found = gradient(loss, student, teacher)
    for rows in (slice(0, 2), slice(2, None)):
        assert (found - expected)[rows].norm() < 1e-6 * expected[rows].norm()


@pytest.mark.parametrize(("loss", "formula"), FORMULAS, ids=IDS)
@pytest.mark.parametrize("scale", [1e4, 1e6])
def test_an_outlier_leaves_the_other_gradients(loss: torch.nn.Module, formula: Any, scale: float) -> None:
    student, teacher = torch.randn(64, 16), torch.randn(64, 32)
    student[0] *= scale
    expected = gradient(formula, student.double(), teacher.double())[1:]
    assert (gradient(loss, student, teacher)[1:] - expected).norm() < 1e-6 * expected.norm()


def test_angles_take_memory_of_distances_not_of_cosines() -> None:
    n = 300
    with LargestTensor() as largest:
        gradient(RKDAngle(), torch.randn(n, 4), torch.randn(n, 4))
    assert n * n < largest.elements <= 3 << 17


@pytest.mark.parametrize(("loss", "slow"), CASES, ids=IDS)
def test_large_errors_leave_the_quadratic_branch(loss: torch.nn.Module, slow: Slow) -> None:
    student = torch.tensor([[0.0], [1.0], [100.0]], dtype=torch.float64)
    teacher = torch.tensor([[0.0, 0.0], [50.0, 1.0], [0.1, 0.0]], dtype=torch.float64)
    assert loss(student, teacher).item() == pytest.approx(slow(student, teacher), rel=1e-9)


@pytest.mark.parametrize(("loss", "slow"), CASES, ids=IDS)
def test_embeddings_far_from_the_origin_keep_their_relations(loss: torch.nn.Module, slow: Slow) -> None:
    student, teacher = torch.randn(8, 4) * 0.01 + 5, torch.randn(8, 4)
    assert loss(student, teacher).item() == pytest.approx(slow(student.double(), teacher.double()), rel=1e-4)


@pytest.mark.parametrize("loss", [RKDDistance(), RKDAngle()], ids=IDS)
def test_gradient_equals_finite_differences(loss: torch.nn.Module) -> None:
    student = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(6, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: loss(x, teacher), student)


@pytest.mark.parametrize("loss", [RKDDistance(), RKDAngle()], ids=IDS)
def test_scaled_rotated_and_moved_teacher_is_no_error(loss: torch.nn.Module) -> None:
    student = torch.randn(10, 5, dtype=torch.float64, requires_grad=True)
    turn, _ = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))
    value = loss(student, 3 * student.detach() @ turn + 7)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-20)
    assert student.grad is not None
    assert student.grad.abs().max().item() < 1e-10


@pytest.mark.parametrize("loss", [RKDDistance(), RKDAngle()], ids=IDS)
@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_identical_rows_pass_no_gradient(loss: torch.nn.Module, n: int, dtype: torch.dtype) -> None:
    student = torch.ones(n, 3, dtype=dtype, requires_grad=True)
    value = loss(student, torch.randn(n, 3, dtype=dtype))
    value.backward()
    assert torch.isfinite(value)
    assert student.grad is not None
    assert (student.grad == 0).all()


@pytest.mark.parametrize("loss", [RKDDistance(), RKDAngle()], ids=IDS)
def test_teacher_gets_no_gradient(loss: torch.nn.Module) -> None:
    student, teacher = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    loss(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad is not None


@pytest.mark.parametrize(("kind", "loss"), [("rkd_distance", RKDDistance()), ("rkd_angle", RKDAngle())])
@pytest.mark.parametrize("case", ["small", "paper64", "paper128", "odd", "dup"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_reproduces_the_published_code(
    reference: np.lib.npyio.NpzFile, kind: str, loss: torch.nn.Module, case: str, dtype: torch.dtype
) -> None:
    key = f"{kind}/{case}"
    student = torch.from_numpy(reference[f"{key}/student"]).to(dtype).requires_grad_()
    value = loss(student, torch.from_numpy(reference[f"{key}/teacher"]).to(dtype))
    value.backward()
    assert value.item() == pytest.approx(float(reference[f"{key}/loss"]), rel=1e-3 if case == "dup" else 1e-5)
    expected = torch.from_numpy(reference[f"{key}/grad"]).to(dtype)
    assert student.grad is not None
    rows = torch.ones(len(student), dtype=torch.bool)
    if key == "rkd_angle/dup":
        # the published autograd divides by 1e-12 where two student rows coincide: those two rows get 10^8, ours 10^-3
        rows = expected.norm(dim=1) < 1
        assert (~rows).sum() == 2
        assert student.grad[~rows].norm() < 1
    gap = (student.grad - expected)[rows].norm() / expected[rows].norm()
    assert gap < (1e-3 if case == "dup" else 1e-4)


@pytest.mark.cuda
@pytest.mark.parametrize("loss", [RKDDistance(), RKDAngle()], ids=IDS)
@pytest.mark.parametrize("n", [5, 128, 300])
def test_a_gpu_gives_the_same(loss: torch.nn.Module, n: int) -> None:
    student, teacher = torch.randn(n, 16, requires_grad=True), torch.randn(n, 40)
    value = loss(student, teacher)
    (expected,) = torch.autograd.grad(value, student)
    there = student.detach().cuda().requires_grad_()
    with torch.autocast("cuda", torch.bfloat16):
        found = loss(there, teacher.cuda())
    (gradient,) = torch.autograd.grad(found, there)
    torch.testing.assert_close(found.cpu(), value, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(gradient.cpu(), expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item())


@pytest.mark.cuda
@pytest.mark.parametrize("n", [128, 256, 512])
def test_a_gpu_holds_no_more_than_a_few_blocks(n: int) -> None:
    student, teacher = torch.randn(n, 16, device="cuda"), torch.randn(n, 16, device="cuda")
    gradient(RKDAngle(), student, teacher)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gradient(RKDAngle(), student, teacher)
    assert torch.cuda.max_memory_allocated() - before < (3 << 23) * 8 + 20 * n * n * 8 + (8 << 20)


def test_a_gpu_gets_few_large_kernels() -> None:
    blocks = {n: len(list(rkd_module._blocks(n, CUDA))) for n in (128, 256, 4096)}
    assert (blocks[128], blocks[256]) == (1, 2)
    assert blocks[4096] < 1.1 * (4096**3 * 8 / 2) / 2**26  # half of the cosines, 64 MB at a time
    for n in (128, 256):
        with SimulatedGpu() as gpu:
            gradient(RKDAngle(), torch.randn(n, 16).to(CUDA), torch.randn(n, 16).to(CUDA))
        assert gpu.launches < 33 * blocks[n] + 140


@pytest.mark.parametrize("n", [128, 131, 200])
def test_blocks_of_a_gpu_give_the_same(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = torch.randn(n, 16), torch.randn(n, 40)
    value, pull = RKDAngle()(student, teacher), gradient(RKDAngle(), student, teacher)
    blocks = rkd_module._blocks
    monkeypatch.setattr(rkd_module, "_blocks", lambda count, device: blocks(count, CUDA))
    torch.testing.assert_close(RKDAngle()(student, teacher), value)
    torch.testing.assert_close(gradient(RKDAngle(), student, teacher), pull)


@pytest.mark.parametrize("loss", [RKDDistance(), RKDAngle()], ids=IDS)
def test_a_compiled_loss_is_compiled_once(loss: torch.nn.Module) -> None:
    torch._dynamo.reset()
    made: list[object] = []

    def count(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., object]:
        made.append(inputs)
        return graph.forward

    compiled, counts = torch.compile(loss, backend=count), []
    for _ in range(3):
        student, teacher = torch.randn(6, 4, requires_grad=True), torch.randn(6, 5)
        found = compiled(student, teacher)
        torch.testing.assert_close(found, loss(student, teacher))
        counts.append(len(made))
    assert counts[0] > 0 and counts == counts[:1] * 3
