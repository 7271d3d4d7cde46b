"""Miners against the obvious loops, and distance-weighted draws against their formula and the published counts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rkd_cli.mining import AllPairs, DistanceWeighted, HardNegative, RandomNegative, SemiHardNegative

DTYPES = [torch.float32, torch.float64]
LABELS = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 3])


def slow_triplets(kind: str, x: Tensor, labels: Tensor) -> list[tuple[int, int, int]]:
    rows, triplets = x.tolist(), []
    for a in range(len(rows)):
        negatives = [n for n in range(len(rows)) if labels[n] != labels[a]]
        for p in range(len(rows)):
            if p == a or labels[p] != labels[a] or not negatives:
                continue
            far = {n: math.dist(rows[a], rows[n]) for n in negatives}
            beyond = [n for n in negatives if far[n] > math.dist(rows[a], rows[p])]
            if kind == "all":
                triplets += [(a, p, n) for n in negatives]
            elif kind == "hard":
                triplets.append((a, p, min(negatives, key=far.__getitem__)))
            else:
                pick = min(beyond, key=far.__getitem__) if beyond else max(negatives, key=far.__getitem__)
                triplets.append((a, p, pick))
    return triplets


@pytest.mark.parametrize("kind", ["all", "hard", "semihard"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", [1.0, 5.0])
def test_equals_the_loop(kind: str, dtype: torch.dtype, spread: float) -> None:
    miner = {"all": AllPairs(), "hard": HardNegative(), "semihard": SemiHardNegative()}[kind]
    x = torch.randn(9, 4, dtype=dtype) + spread * LABELS[:, None].to(dtype)
    found = torch.stack(miner(x, LABELS), dim=1)
    assert sorted(map(tuple, found.tolist())) == slow_triplets(kind, x.double(), LABELS)


@pytest.mark.parametrize("miner", [RandomNegative(), DistanceWeighted(), DistanceWeighted(published=True)])
def test_every_pair_gets_one_negative(miner) -> None:
    x = F.normalize(torch.randn(9, 16), dim=1)
    anchor, positive, negative = miner(x, LABELS)
    pairs = [(a, p) for a in range(9) for p in range(9) if a != p and LABELS[a] == LABELS[p]]
    assert list(zip(anchor.tolist(), positive.tolist(), strict=True)) == pairs
    assert (LABELS[anchor] != LABELS[negative]).all()


@pytest.mark.parametrize("miner", [HardNegative(), SemiHardNegative(), DistanceWeighted()])
def test_duplicates_across_classes_are_the_nearest_negatives(miner) -> None:
    x = F.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, 0.0], [-1.0, 0.2]]), dim=1)
    anchor, _, negative = miner(x, torch.tensor([0, 0, 1, 2]))
    assert set(anchor.tolist()) == {0, 1}
    if isinstance(miner, HardNegative):
        assert negative.tolist() == [2, 2]


def test_random_negatives_are_uniform() -> None:
    labels = torch.tensor([0, 0, 1, 1, 1, 2])
    draws = torch.cat([torch.stack(RandomNegative()(torch.zeros(6, 2), labels), dim=1) for _ in range(4000)])
    counts = torch.bincount(draws[draws[:, 0] == 0, 2], minlength=6) / 4000
    assert counts[:2].sum() == 0
    assert counts[2:].sub(0.25).abs().max() < 0.03


def slow_weights(x: Tensor, labels: Tensor, anchor: int) -> list[float]:
    """1/q(d) of Wu et al. in log space over the valid negatives, or uniform where there is none."""
    d, logs = x.shape[1], {}
    for n in range(len(x)):
        gap = max(0.5, math.dist(x[anchor].tolist(), x[n].tolist()))
        if labels[n] != labels[anchor] and gap < 1.4:
            logs[n] = -((d - 2) * math.log(gap) + (d - 3) / 2 * math.log(1 - gap * gap / 4))
    negatives = [n for n in range(len(x)) if labels[n] != labels[anchor]]
    if not logs:
        return [1 / len(negatives) if n in negatives else 0.0 for n in range(len(x))]
    top = max(logs.values())
    total = sum(math.exp(v - top) for v in logs.values())
    return [math.exp(logs[n] - top) / total if n in logs else 0.0 for n in range(len(x))]


def weights_of(miner: DistanceWeighted, x: Tensor, labels: Tensor) -> Tensor:
    """(N, N) frequencies of drawing j for anchor i, from the miner's own calls on one positive pair an anchor."""
    negatives = labels[:, None] != labels[None, :]
    weights = miner._published_weights(x, negatives) if miner.published else miner._weights(x, negatives)
    return (weights / weights.sum(dim=1, keepdim=True)).double()


@pytest.mark.parametrize("dim", [3, 24, 512])
@pytest.mark.parametrize("dtype", DTYPES)
def test_distance_weights_equal_their_formula(dim: int, dtype: torch.dtype) -> None:
    x = F.normalize(torch.randn(9, dim, dtype=dtype) + torch.randn(dim, dtype=dtype), dim=1)
    weights = weights_of(DistanceWeighted(), x, LABELS)
    for anchor in range(9):
        slow = slow_weights(x.double(), LABELS, anchor)
        assert weights[anchor].tolist() == pytest.approx(slow, rel=1e-4, abs=1e-12)


def test_distance_weights_survive_close_positives_where_the_published_arithmetic_goes_uniform() -> None:
    """At d = 512 two classes, each tight, with negatives at differing distances."""
    centres = F.normalize(torch.randn(6, 512) + 0.8 * torch.randn(512), dim=1)
    x = F.normalize(centres.repeat_interleave(3, dim=0) + 0.001 * torch.randn(18, 512), dim=1)
    labels = torch.arange(6).repeat_interleave(3)
    ours, published = (weights_of(DistanceWeighted(kind), x, labels)[0] for kind in (False, True))
    assert published[3:].tolist() == pytest.approx([1 / 15] * 15, rel=1e-5)
    assert ours.tolist() == pytest.approx(slow_weights(x.double(), labels, 0), rel=1e-4, abs=1e-12)
    assert ours.max() > 0.3


def test_opposite_embeddings_stay_finite_but_not_in_the_published_arithmetic() -> None:
    x = torch.zeros(4, 8)
    x[:, 0] = torch.tensor([1.0, 1.0, -1.0, -1.0])
    labels = torch.tensor([0, 0, 1, 1])
    assert DistanceWeighted()(x, labels)[2].tolist() in (
        [i, j, k, m] for i in (2, 3) for j in (2, 3) for k in (0, 1) for m in (0, 1)
    )
    with pytest.raises(FloatingPointError, match="opposite"):
        DistanceWeighted(published=True)(x, labels)


@pytest.mark.parametrize("published", [False, True])
def test_distance_weights_look_at_directions_alone(published: bool) -> None:
    x = F.normalize(torch.randn(9, 16) + 0.5, dim=1)
    miner, draws = DistanceWeighted(published), []
    for scale in (torch.ones(9, 1), torch.rand(9, 1) * 10 + 0.1):
        torch.manual_seed(3)
        draws.append(torch.cat([miner(x * scale, LABELS)[2] for _ in range(20)]))
    assert (draws[0] == draws[1]).float().mean() > 0.99  # but for a draw that rounding decides


@pytest.mark.parametrize("published", [False, True])
def test_draws_like_the_published_code(reference: np.lib.npyio.NpzFile, published: bool) -> None:
    x = torch.from_numpy(reference["distance_weighted/embeddings"])
    labels = torch.from_numpy(reference["distance_weighted/labels"])
    expected = torch.from_numpy(reference["distance_weighted/freq"]).double()
    anchors = expected.sum(dim=1) > 0
    miner = DistanceWeighted(published)
    counts = torch.zeros(41, 41)
    for _ in range(500):
        anchor, _, negative = miner(x, labels)
        counts.index_put_((anchor, negative), torch.ones(len(anchor)), accumulate=True)
    drawn = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
    assert (drawn.sum(dim=1) > 0).tolist() == anchors.tolist()
    # 1,500 or more draws a row: five standard deviations of the likeliest negative
    assert (drawn - expected)[anchors].abs().max() < 5 * (0.25 / 1500) ** 0.5
    assert (weights_of(miner, x, labels) - expected)[anchors].abs().max() < 5 * (0.25 / 20000) ** 0.5
