"""The losses of labels without triplets against loops, pytorch-metric-learning, and finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rkd_cli.losses.smooth_ap
from rkd_cli.losses import ArcFace, MultiSimilarity, NormalizedSoftmax, ProxyAnchor, SmoothAP

DTYPES = [torch.float32, torch.float64]
Rows = list[list[float]]
LABELS = torch.tensor([0, 3, 3, 1, 0, 3, 5, 1, 3])  # of six classes two are absent and one is alone


def cosine(u: list[float], v: list[float]) -> float:
    return sum(a * b for a, b in zip(u, v, strict=True)) / (math.hypot(*u) * math.hypot(*v))


def slow_multi_similarity(x: Rows, labels: list[int], alpha: float, beta: float, base: float, epsilon: float) -> float:
    total = 0.0
    for i in range(len(x)):
        s = [cosine(x[i], row) for row in x]
        positives = [s[j] for j in range(len(x)) if labels[j] == labels[i] and j != i]
        negatives = [s[j] for j in range(len(x)) if labels[j] != labels[i]]
        if positives and negatives:
            mined = [p for p in positives if p < max(negatives) + epsilon]
            total += math.log(1 + sum(math.exp(-alpha * (p - base)) for p in mined)) / alpha
            mined = [n for n in negatives if n > min(positives) - epsilon]
            total += math.log(1 + sum(math.exp(beta * (n - base)) for n in mined)) / beta
    return total / len(x)


def slow_proxy_anchor(x: Rows, proxies: Rows, labels: list[int], alpha: float, margin: float) -> float:
    attract = repel = 0.0
    for c, proxy in enumerate(proxies):
        own = [cosine(row, proxy) for row, label in zip(x, labels, strict=True) if label == c]
        others = [cosine(row, proxy) for row, label in zip(x, labels, strict=True) if label != c]
        if own:
            attract += math.log(1 + sum(math.exp(-alpha * (s - margin)) for s in own))
        repel += math.log(1 + sum(math.exp(alpha * (s + margin)) for s in others))
    return attract / len(set(labels)) + repel / len(proxies)


def slow_softmax(logits: Rows, labels: list[int]) -> float:
    costs = [math.log(sum(map(math.exp, row))) - row[y] for row, y in zip(logits, labels, strict=True)]
    return sum(costs) / len(costs)


def slow_normalized_softmax(x: Rows, proxies: Rows, labels: list[int], temperature: float) -> float:
    return slow_softmax([[cosine(row, p) / temperature for p in proxies] for row in x], labels)


def slow_arc_face(x: Rows, proxies: Rows, labels: list[int], scale: float, margin: float) -> float:
    logits = [[cosine(row, p) for p in proxies] for row in x]
    for row, y in zip(logits, labels, strict=True):
        angle = math.acos(row[y])
        falling = angle <= math.pi - margin
        row[y] = math.cos(angle + margin) if falling else row[y] - margin * math.sin(margin)
    return slow_softmax([[scale * c for c in row] for row in logits], labels)


def slow_smooth_ap(x: Rows, labels: list[int], temperature: float) -> float:
    costs = []
    for q in range(len(x)):
        s = [cosine(x[q], row) for row in x]
        positives = [j for j in range(len(x)) if labels[j] == labels[q]]

        def rank(i: int, among: list[int], s: list[float] = s) -> float:
            return 1 + sum(1 / (1 + math.exp((s[i] - s[j]) / temperature)) for j in among if j != i)

        if len(positives) > 1:
            precision = [rank(i, positives) / rank(i, list(range(len(x)))) for i in positives]
            costs.append(1 - sum(precision) / len(positives))
    return sum(costs) / len(costs) if costs else 0.0


def with_proxies(slow: Callable[..., float], *settings: float) -> Callable[[nn.Module, Tensor, Tensor], float]:
    return lambda loss, x, labels: slow(x.tolist(), loss.get_parameter("proxies").tolist(), labels.tolist(), *settings)


def without(slow: Callable[..., float], *settings: float) -> Callable[[nn.Module, Tensor, Tensor], float]:
    return lambda loss, x, labels: slow(x.tolist(), labels.tolist(), *settings)


# of 6 classes and 4 coordinates
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Tensor, Tensor], float]]] = {
    "multi": (lambda: MultiSimilarity(2, 50, 1, 0.1), without(slow_multi_similarity, 2, 50, 1, 0.1)),
    "multi 3 20 .5 .3": (lambda: MultiSimilarity(3, 20, 0.5, 0.3), without(slow_multi_similarity, 3, 20, 0.5, 0.3)),
    "multi all": (lambda: MultiSimilarity(2, 10, 0.5, 2.1), without(slow_multi_similarity, 2, 10, 0.5, 2.1)),
    "anchor": (lambda: ProxyAnchor(6, 4, 32, 0.1), with_proxies(slow_proxy_anchor, 32, 0.1)),
    "anchor 8 .3": (lambda: ProxyAnchor(6, 4, 8, 0.3), with_proxies(slow_proxy_anchor, 8, 0.3)),
    "softmax": (lambda: NormalizedSoftmax(6, 4, 0.05), with_proxies(slow_normalized_softmax, 0.05)),
    "softmax .5": (lambda: NormalizedSoftmax(6, 4, 0.5), with_proxies(slow_normalized_softmax, 0.5)),
    "arcface": (lambda: ArcFace(6, 4, 64, 0.5), with_proxies(slow_arc_face, 64, 0.5)),
    "arcface 5 1.2": (lambda: ArcFace(6, 4, 5, 1.2), with_proxies(slow_arc_face, 5, 1.2)),
    "ap": (lambda: SmoothAP(0.01), without(slow_smooth_ap, 0.01)),
    "ap .2": (lambda: SmoothAP(0.2), without(slow_smooth_ap, 0.2)),
}
PAIRWISE = [name for name in CASES if name.startswith(("multi", "ap"))]
PROXIED = [name for name in CASES if name not in PAIRWISE]


def gradients(loss: nn.Module, x: Tensor, labels: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Of a loss, by the embeddings and by the proxies where there are any."""
    x = x.detach().clone().requires_grad_()
    value: Tensor = loss(x, labels)
    return value.detach(), list(torch.autograd.grad(value, [x, *loss.parameters()]))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 3, 9])
def test_equals_the_loop(case: str, dtype: torch.dtype, n: int) -> None:
    make, slow = CASES[case]
    for _ in range(5):
        loss, x, labels = make().to(dtype), 3 * torch.randn(n, 4, dtype=dtype), LABELS[-n:]
        value = loss(x, labels)
        assert value.dtype == dtype
        assert value.item() == pytest.approx(slow(loss, x, labels), rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_gradient_equals_finite_differences(case: str) -> None:
    loss = CASES[case][0]().double()
    x = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda e, *_: loss(e, LABELS), (x, *loss.parameters()))


@pytest.mark.parametrize("case", CASES)
def test_float32_loses_nothing_but_the_last_digits(case: str) -> None:
    loss, x = CASES[case][0](), torch.randn(9, 4)
    value, found = gradients(loss, x, LABELS)
    expected, exact = gradients(loss.double(), x.double(), LABELS)
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    for one, other in zip(found, exact, strict=True):
        assert (one - other).norm() <= 1e-6 * other.norm()


@pytest.mark.parametrize("case", CASES)
def test_lengths_do_not_count(case: str) -> None:
    loss, x = CASES[case][0](), torch.randn(9, 4, dtype=torch.float64)
    lengths = 10 ** torch.linspace(-9, 9, 9, dtype=torch.float64)[:, None]
    torch.testing.assert_close(loss(lengths * x, LABELS), loss(x, LABELS))


def theirs(case: str, loss: nn.Module, x: Tensor, labels: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The value and the gradients of pytorch-metric-learning, with the proxies of ``loss``."""
    library: Any = pytest.importorskip("pytorch_metric_learning.losses")
    miners: Any = pytest.importorskip("pytorch_metric_learning.miners")
    x = x.detach().clone().requires_grad_()
    if case == "multi":
        other = library.MultiSimilarityLoss(2, 50, 1)
        mined = miners.MultiSimilarityMiner(0.1)(x, labels)
        value = other(x, labels, mined)
    elif case == "ap":
        value = library.SmoothAPLoss(0.01)(x, labels)
    else:
        (proxies,) = loss.parameters()
        classes, size = proxies.shape
        if case == "anchor":
            other = library.ProxyAnchorLoss(classes, size, margin=0.1, alpha=32)
            other.proxies.data, weights = proxies.detach().clone(), other.proxies
        else:
            kind = library.NormalizedSoftmaxLoss if case == "softmax" else library.ArcFaceLoss
            settings = {"temperature": 0.05} if case == "softmax" else {"scale": 64, "margin": math.degrees(0.5)}
            other = kind(classes, size, **settings)
            other.W.data, weights = proxies.detach().T.clone(), other.W
        # their softmax takes the embeddings' length as a part of the temperature
        value = other(F.normalize(x, dim=1) if case == "softmax" else x, labels)
        of_x, of_weights = torch.autograd.grad(value, [x, weights])
        return value.detach(), [of_x, of_weights if case == "anchor" else of_weights.T]
    return value.detach(), list(torch.autograd.grad(value, x))


@pytest.fixture
def _double() -> Iterator[None]:
    """Their SmoothAP adds up in torch's default type."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("_double")
@pytest.mark.parametrize("case", ["multi", "anchor", "softmax", "arcface", "ap"])
def test_equals_pytorch_metric_learning(case: str) -> None:
    # their SmoothAP (2.9) wants classes of one size, one after the other, and takes that size for the number of classes
    labels = torch.arange(25) // 5 if case == "ap" else torch.randint(0, 6, (25,))
    for spread in (0.3, 1, 3):
        loss, x = CASES[case][0](), (spread * torch.randn(6, 4))[labels] + torch.randn(25, 4)
        value, found = gradients(loss, x, labels)
        expected, others = theirs(case, loss, x, labels)
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)
        for one, other in zip(found, others, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("case", PAIRWISE)
@pytest.mark.parametrize("labels", [[0], [0, 1], [0, 1, 2]])
def test_a_batch_without_positives_costs_nothing(case: str, labels: list[int]) -> None:
    value, (gradient,) = gradients(CASES[case][0](), torch.randn(len(labels), 4), torch.tensor(labels))
    assert value.item() == 0
    assert (gradient == 0).all()


@pytest.mark.parametrize("case", PAIRWISE)
@pytest.mark.parametrize("n", [2, 3, 9])
def test_one_class_has_nothing_to_learn(case: str, n: int) -> None:
    value, (gradient,) = gradients(CASES[case][0](), torch.randn(n, 4), torch.full((n,), 3))
    assert value.item() == pytest.approx(0, abs=1e-12)
    assert gradient.abs().max() < 1e-12


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fill", [0.0, 0.5])
def test_identical_embeddings_stay_finite(case: str, dtype: torch.dtype, fill: float) -> None:
    value, found = gradients(CASES[case][0]().to(dtype), torch.full((9, 4), fill, dtype=dtype), LABELS)
    assert torch.isfinite(value)
    assert all(torch.isfinite(gradient).all() for gradient in found)
    if fill == 0:
        assert (found[0] == 0).all()


@pytest.mark.parametrize("case", CASES)
def test_a_row_of_zeros_passes_no_gradient_and_the_others_keep_theirs(case: str) -> None:
    loss, x = CASES[case][0]().double(), torch.randn(9, 4, dtype=torch.float64)
    x[4] = 0
    _, (gradient, *_) = gradients(loss, x, LABELS)
    assert (gradient[4] == 0).all()
    others = torch.arange(9)[:, None] != 4
    assert torch.autograd.gradcheck(lambda e: loss(e.where(others, 0), LABELS), x.requires_grad_())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("labels", [LABELS, torch.zeros(9, dtype=torch.long), torch.arange(9) % 6, LABELS[:1]])
@pytest.mark.parametrize("row", [0, 6])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_one_bad_number_costs_nan(case: str, labels: Tensor, row: int, bad: float) -> None:
    x = torch.randn(len(labels), 4)
    x[row % len(x), 2] = bad
    assert CASES[case][0]()(x, labels).isnan()


@pytest.mark.parametrize("case", PROXIED)
def test_a_bad_proxy_costs_nan(case: str) -> None:
    loss = CASES[case][0]()
    loss.get_parameter("proxies").data[4, 1] = math.nan  # of a class that the batch lacks
    assert loss(torch.randn(9, 4), LABELS).isnan()


@pytest.mark.parametrize("case", PROXIED)
def test_a_label_beyond_the_classes_is_an_error(case: str) -> None:
    for label in (6, -1):
        with pytest.raises((IndexError, RuntimeError)):
            CASES[case][0]()(torch.randn(1, 4), torch.tensor([label]))


@pytest.mark.parametrize("case", PROXIED)
def test_the_proxies_are_the_only_parameter(case: str) -> None:
    assert {name: tuple(p.shape) for name, p in CASES[case][0]().named_parameters()} == {"proxies": (6, 4)}


def test_the_proxies_start_as_published() -> None:
    """250,000 draws each: the spread of a normal with variance 2/C, and of a uniform in +-1/sqrt(D)."""
    proxies = ProxyAnchor(500, 500, 32, 0.1).proxies
    assert proxies.std().item() == pytest.approx((2 / 500) ** 0.5, rel=0.01)
    assert ProxyAnchor(1000, 10, 32, 0.1).proxies.std().item() == pytest.approx((2 / 1000) ** 0.5, rel=0.05)
    assert (proxies.abs() < 0.674490 * proxies.std()).float().mean().item() == pytest.approx(0.5, abs=0.01)
    for loss in (NormalizedSoftmax(2500, 100, 0.05), ArcFace(2500, 100, 64, 0.5)):
        assert 0.0999 < loss.proxies.abs().max() <= 0.1
        assert loss.proxies.std().item() == pytest.approx(0.1 / 3**0.5, rel=0.01)


@pytest.mark.parametrize(
    "angle", [0, 1e-9, 1e-7, 1e-4, 1, math.pi - 0.501, math.pi - 0.499, 3, math.pi - 1e-7, math.pi]
)
def test_arc_face_at_any_angle(angle: float) -> None:
    """Two classes at a right angle to each other: the value is known, and the gradient bounded by the scale."""
    loss = ArcFace(2, 3, 64, 0.5).double()
    loss.proxies.data = torch.tensor([[1.0, 0, 0], [0, 0, 1]], dtype=torch.float64)
    x = torch.tensor([[math.cos(angle), math.sin(angle), 0]], dtype=torch.float64)
    value, found = gradients(loss, x, torch.tensor([0]))
    target = math.cos(angle + 0.5) if angle <= math.pi - 0.5 else math.cos(angle) - 0.5 * math.sin(0.5)
    assert value.item() == pytest.approx(math.log(1 + math.exp(-64 * target)), rel=1e-5, abs=1e-12)
    for gradient in found:
        assert torch.isfinite(gradient).all()
        assert gradient.norm() <= 64 * 1.5


def test_arc_face_costs_more_the_wider_the_angle() -> None:
    loss = ArcFace(2, 3, 1, 0.5).double()
    loss.proxies.data = torch.tensor([[1.0, 0, 0], [0, 0, 1]], dtype=torch.float64)
    angles = torch.linspace(1e-5, math.pi - 1e-5, 1000, dtype=torch.float64)
    rows = torch.stack([angles.cos(), angles.sin(), 0 * angles], dim=1)
    costs = torch.stack([loss(row[None], torch.tensor([0])) for row in rows])
    assert (costs.diff() > 0).all()


def test_smooth_ap_of_a_perfect_and_of_the_worst_ranking() -> None:
    directions = torch.eye(3, dtype=torch.float64)[[0, 0, 1, 1, 1, 2]]
    assert SmoothAP(0.01)(directions, torch.tensor([7, 7, 1, 1, 1, 4])).item() == pytest.approx(0, abs=1e-9)
    # the query is first, its positive last behind two negatives: AP (1 + 2/4) / 2
    worst = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]], dtype=torch.float64)
    assert SmoothAP(0.01)(worst, torch.tensor([0, 0, 1, 2])).item() == pytest.approx(0.25)


@pytest.mark.parametrize("elements", [1, 40, 100])
def test_smooth_ap_in_blocks_is_the_same(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    loss, x = SmoothAP(0.1), torch.randn(9, 4, dtype=torch.float64)
    value, (gradient,) = gradients(loss, x, LABELS)
    monkeypatch.setattr(rkd_cli.losses.smooth_ap, "_ELEMENTS", elements)
    again, (pull,) = gradients(loss, x, LABELS)
    torch.testing.assert_close(again, value)
    torch.testing.assert_close(pull, gradient)


@pytest.mark.cuda
@pytest.mark.parametrize("case", CASES)
def test_cuda_agrees(case: str) -> None:
    loss, x = CASES[case][0](), torch.randn(9, 4)
    value, found = gradients(loss, x, LABELS)
    other, others = gradients(loss.cuda(), x.cuda(), LABELS.cuda())
    torch.testing.assert_close(other.cpu(), value)
    for one, two in zip(found, others, strict=True):
        torch.testing.assert_close(two.cpu(), one)
