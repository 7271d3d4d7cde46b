"""Miners against the obvious loops, and distance-weighted draws against their formula and the published counts."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rkd_cli import mining
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
    miner: Any = {"all": AllPairs(), "hard": HardNegative(), "semihard": SemiHardNegative()}[kind]
    x = torch.randn(9, 4, dtype=dtype) + spread * LABELS[:, None].to(dtype)
    found = torch.stack(miner(x, LABELS), dim=1)
    assert sorted(map(tuple, found.tolist())) == slow_triplets(kind, x.double(), LABELS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(500, 128), (7, 1), (1, 3), (0, 4)])
def test_negatives_are_those_that_multinomial_draws(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weights = torch.rand(shape, dtype=dtype) * (torch.rand(shape) > 0.3)
    weights[:, 0] += 1e-3
    torch.manual_seed(3)
    expected = torch.multinomial(weights, 1)[:, 0] if len(weights) else torch.zeros(0, dtype=torch.long)
    after = torch.rand(2)
    torch.manual_seed(3)
    assert torch.equal(mining._draw(weights), expected)
    assert torch.equal(torch.rand(2), after)


@pytest.mark.parametrize("miner", [RandomNegative(), DistanceWeighted(), DistanceWeighted(published=True)])
def test_every_pair_gets_one_negative(miner: Any) -> None:
    x = F.normalize(torch.randn(9, 16), dim=1)
    anchor, positive, negative = miner(x, LABELS)
    pairs = [(a, p) for a in range(9) for p in range(9) if a != p and LABELS[a] == LABELS[p]]
    assert list(zip(anchor.tolist(), positive.tolist(), strict=True)) == pairs
    assert (LABELS[anchor] != LABELS[negative]).all()


@pytest.mark.parametrize("miner", [HardNegative(), SemiHardNegative(), DistanceWeighted()])
def test_duplicates_across_classes_are_the_nearest_negatives(miner: Any) -> None:
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


def frequencies(miner: DistanceWeighted, x: Tensor, labels: Tensor, calls: int = 1) -> tuple[Tensor, int]:
    """How often the copies of row 0 draw each row, and the number of draws: copies draw with the same weights, one
    negative for each of their positives."""
    drawn = torch.zeros(len(x), dtype=torch.float64)
    for _ in range(calls):
        anchor, _, negative = miner(x, labels)
        drawn += torch.bincount(negative[(x[anchor] == x[0]).all(dim=1)], minlength=len(x))
    return drawn / drawn.sum(), int(drawn.sum())


def assert_likely(found: Tensor, draws: int, expected: Tensor) -> None:
    """Within five standard deviations of every share, and nothing that has no weight."""
    assert (found[expected == 0] == 0).all()
    assert ((found - expected).abs() <= 5 * (expected * (1 - expected) / draws).sqrt() + 5 / draws).all()


def at(distance: float, dim: int) -> Tensor:
    """(D,) of unit length, that far from ``at(0, dim)``."""
    cosine = 1 - distance * distance / 2
    return torch.tensor([cosine, math.sqrt(1 - cosine * cosine), *[0.0] * (dim - 2)], dtype=torch.float64)


@pytest.mark.parametrize("dim", [3, 24, 512])
@pytest.mark.parametrize("dtype", DTYPES)
def test_distance_weights_equal_their_formula(dim: int, dtype: torch.dtype) -> None:
    """Negatives at distances that weigh alike to within a factor of ten, at D = 3 some of them too far to be drawn."""
    rows = [at(0.9 * math.exp(2 * step / 8 / dim), dim) for step in range(9)]
    x = torch.stack([at(0, dim)] * 150 + [at(0.7, dim)] + rows).to(dtype)  # and a positive that is elsewhere
    labels = torch.tensor([0] * 151 + [1, 1, 1, 2, 2, 2, 2, 3, 4])
    found, draws = frequencies(DistanceWeighted(), x, labels, calls=4)
    expected = torch.tensor(slow_weights(x.double(), labels, 0), dtype=torch.float64)
    assert expected.max() > 1.5 * expected[expected > 0].min(), "a draw that weights decide"
    assert draws == 4 * 150 * 150
    assert_likely(found, draws, expected)


def test_a_negative_nearer_than_a_half_or_beyond_the_reach_of_the_margin() -> None:
    """At D = 8, distances 0.1 and 0.3 weigh as 0.5 does, 1.39 weighs, 1.41 and 1.9 never; alone they are uniform."""
    anchors, labels = at(0, 8).float().repeat(150, 1), torch.tensor([0] * 150 + [1, 2, 3, 4, 5])
    x = torch.cat([anchors, torch.stack([at(d, 8) for d in (0.1, 0.3, 1.39, 1.41, 1.9)]).float()])
    for miner in (DistanceWeighted(), DistanceWeighted(published=True)):
        found, draws = frequencies(miner, x, labels, calls=2)
        expected = torch.tensor(slow_weights(x.double(), labels, 0), dtype=torch.float64)
        assert expected[150].item() == pytest.approx(expected[151].item(), rel=1e-6)
        assert expected[152] > 0
        assert (expected[153:] == 0).all()
        assert_likely(found, draws, expected)
        far = torch.arange(155) >= 153
        found, draws = frequencies(miner, torch.cat([anchors, x[far]]), torch.cat([labels[:150], labels[far]]))
        assert_likely(found, draws, torch.tensor([0.0] * 150 + [0.5, 0.5], dtype=torch.float64))


@pytest.mark.parametrize("published", [False, True])
def test_one_anchors_weights_are_scaled_by_no_other_anchors(published: bool) -> None:
    """At D = 512 the rows far from row 0 lie so close together that beside their weights its own would round to 0."""
    x, labels = torch.stack([at(d, 512) for d in (0, 1.2, 1.0, 1.1)]).float(), torch.tensor([0, 0, 1, 2])
    found, draws = frequencies(DistanceWeighted(published), x, labels, calls=100)
    assert_likely(found, draws, torch.tensor(slow_weights(x.double(), labels, 0), dtype=torch.float64))


def test_distance_weights_survive_close_positives_where_the_published_arithmetic_goes_uniform() -> None:
    """At d = 512 tight classes with negatives at differing distances."""
    centers = F.normalize(torch.randn(6, 512) + 0.8 * torch.randn(512), dim=1)
    x = F.normalize(centers.repeat_interleave(3, dim=0) + 0.001 * torch.randn(18, 512), dim=1)
    x, labels = torch.cat([x[:1].repeat(100, 1), x]), torch.arange(6).repeat_interleave(3)
    labels = torch.cat([torch.zeros(100, dtype=torch.long), labels])
    ours, published = (frequencies(DistanceWeighted(kind), x[:116], labels[:116]) for kind in (False, True))
    uniform = torch.tensor([0.0] * 103 + [1 / 13] * 13, dtype=torch.float64)
    assert_likely(*published, uniform)
    assert ours[0].max() > 0.3


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


MINERS: dict[str, Any] = {
    "all": AllPairs(),
    "random": RandomNegative(),
    "hard": HardNegative(),
    "semihard": SemiHardNegative(),
    "weighted": DistanceWeighted(),
    "published": DistanceWeighted(published=True),
}


@pytest.mark.parametrize("name", MINERS)
@pytest.mark.parametrize("labels", [[0], [0, 0], [0, 1], [0, 1, 2], [0] * 9])
def test_without_a_pair_or_a_negative_there_is_no_triplet(name: str, labels: list[int]) -> None:
    found = MINERS[name](torch.randn(len(labels), 4), torch.tensor(labels))
    assert [tensor.shape for tensor in found] == [(0,)] * 3
    assert all(tensor.dtype == torch.long for tensor in found)


@pytest.mark.parametrize("name", MINERS)
def test_autocast_and_half_precision_pick_the_same_triplets(name: str) -> None:
    x, labels = F.normalize(torch.randn(60, 32) + 0.7, dim=1), torch.arange(60) // 4  # most of them 0.5 to 1.4 apart
    half = x.bfloat16()

    def picks(rows: Tensor, cast: bool) -> Tensor:
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            return torch.cat([torch.stack(MINERS[name](rows, labels)) for _ in range(20)])

    assert torch.equal(picks(x, True), picks(x, False))
    assert torch.equal(picks(half, False), picks(half.float(), False))


@pytest.mark.parametrize("kind", ["hard", "semihard"])
@pytest.mark.parametrize("radius", [1e-3, 1e-5])
def test_embeddings_that_are_close_beside_their_length(kind: str, radius: float) -> None:
    x = torch.randn(1, 4) + radius * torch.randn(9, 4)
    found = torch.stack(MINERS[kind](x, LABELS), dim=1)
    assert sorted(map(tuple, found.tolist())) == slow_triplets(kind, x.double(), LABELS)
