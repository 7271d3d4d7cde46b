"""Triplet and contrastive loss against a loop over triplets, the reference values, and finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rkd_cli.losses import ContrastiveLoss, TripletLoss
from rkd_cli.mining import AllPairs, DistanceWeighted, HardNegative, RandomNegative, SemiHardNegative

DTYPES = [torch.float32, torch.float64]
MINERS: dict[str, Any] = {"all": AllPairs(), "hard": HardNegative(), "semihard": SemiHardNegative()}
LOSSES: dict[str, Callable[[Any], nn.Module]] = {
    "l2_triplet": lambda miner: TripletLoss(2, 0.2, miner),
    "l1_triplet": lambda miner: TripletLoss(1, 0.2, miner),
    "contrastive": lambda miner: ContrastiveLoss(0.2, miner),
}


def slow_loss(name: str, x: Tensor, labels: Tensor) -> float:
    """Over all triplets; 1e-6 is what torch's pairwise distance adds to every coordinate."""

    def distance(a: int, b: int, p: int) -> float:
        differences = [abs(u - v + 1e-6) for u, v in zip(x[a].tolist(), x[b].tolist(), strict=True)]
        return math.hypot(*differences) if p == 2 else math.fsum(differences)

    costs = []
    for a in range(len(x)):
        for p in range(len(x)):
            for n in range(len(x)):
                if a == p or labels[a] != labels[p] or labels[a] == labels[n]:
                    continue
                if name == "contrastive":
                    costs += [distance(a, p, 2) ** 2, max(0.0, 0.2 - distance(a, n, 2)) ** 2]
                else:
                    norm = 2 if name == "l2_triplet" else 1
                    costs.append(max(0.0, distance(a, p, norm) - distance(a, n, norm) + 0.2))
    return sum(costs) / len(costs)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_loop(name: str, dtype: torch.dtype) -> None:
    x, labels = 0.2 * torch.randn(8, 3, dtype=dtype), torch.tensor([0, 0, 1, 1, 1, 2, 2, 3])
    value = LOSSES[name](AllPairs())(x, labels)
    assert value.dtype == dtype
    assert value.item() == pytest.approx(slow_loss(name, x.double(), labels), rel=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_equals_finite_differences(name: str) -> None:
    x, labels = (
        0.2 * torch.randn(6, 3, dtype=torch.float64, requires_grad=True),
        torch.tensor([0, 0, 1, 1, 2, 2]),
    )
    assert torch.autograd.gradcheck(lambda e: LOSSES[name](AllPairs())(e, labels), x)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("gap", [1e-3, 1e-4, 1e-5])
@pytest.mark.parametrize("other", [1, 2])  # the close row is the positive, or a negative
def test_rows_that_nearly_coincide_keep_their_gradient(p: int, gap: float, other: int) -> None:
    x, step, labels = F.normalize(torch.randn(32, 64), dim=1), torch.randn(64), torch.arange(32) // 2
    x[other] = x[0] + gap * step / step.norm()
    a, b, c = (x.double().requires_grad_() for _ in range(3))
    anchor, positive, negative = AllPairs()(x, labels)
    cost = F.triplet_margin_loss(a[anchor], b[positive], c[negative], margin=0.2, p=p)
    expected = sum(torch.autograd.grad(cost, (a, b, c)), torch.zeros(1))
    x.requires_grad_()
    (found,) = torch.autograd.grad(TripletLoss(p, 0.2, AllPairs())(x, labels), x)
    assert (found - expected).norm() < 2e-6 * expected.norm()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("miner", [*MINERS.values(), RandomNegative(), DistanceWeighted(), DistanceWeighted(True)])
@pytest.mark.parametrize("labels", [[0, 0], [0, 1], [0, 0, 0], [0, 1, 2]])
def test_a_batch_without_triplets_costs_nothing(name: str, miner: nn.Module, labels: list[int]) -> None:
    x = torch.randn(len(labels), 4, requires_grad=True)
    value = LOSSES[name](miner)(x, torch.tensor(labels))
    torch.autograd.backward(value)
    assert value.item() == 0
    assert x.grad is not None
    assert (x.grad == 0).all()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("miner", [*MINERS.values(), RandomNegative(), DistanceWeighted(), DistanceWeighted(True)])
def test_identical_embeddings_stay_finite(name: str, miner: nn.Module) -> None:
    x = torch.full((6, 4), 0.5, requires_grad=True)
    value = LOSSES[name](miner)(x, torch.tensor([0, 0, 0, 1, 1, 1]))
    torch.autograd.backward(value)
    assert torch.isfinite(value)
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("case", ["unit", "free"])
@pytest.mark.parametrize("sample", MINERS)
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_reproduces_the_published_code(
    reference: np.lib.npyio.NpzFile, name: str, sample: str, case: str, dtype: torch.dtype
) -> None:
    key = f"{name}/{sample}/{case}"
    x = torch.from_numpy(reference[f"{key}/embeddings"]).to(dtype).requires_grad_()
    labels = torch.from_numpy(reference[f"{key}/labels"])
    triplets = torch.stack(MINERS[sample](x, labels), dim=1)
    assert sorted(map(tuple, triplets.tolist())) == sorted(map(tuple, reference[f"{key}/triplets"].tolist()))
    value = LOSSES[name](MINERS[sample])(x, labels)
    torch.autograd.backward(value)
    expected = torch.from_numpy(reference[f"{key}/grad"])
    assert value.item() == pytest.approx(float(reference[f"{key}/loss"]), rel=1e-5)
    assert x.grad is not None
    assert (x.grad - expected).norm() / expected.norm() < 1e-4
