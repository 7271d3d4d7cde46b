"""Miners by the names that ``--sample`` takes."""

from __future__ import annotations

from rkd_cli import mining
from rkd_cli.losses.pairs import Miner

MINERS: dict[str, Miner] = {
    "random": mining.RandomNegative(),
    "hard": mining.HardNegative(),
    "all": mining.AllPairs(),
    "semihard": mining.SemiHardNegative(),
    "distance": mining.DistanceWeighted(),
    "distance-published": mining.DistanceWeighted(published=True),
}
