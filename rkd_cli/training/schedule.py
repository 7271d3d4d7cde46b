"""The learning rate of a step, counted with its epoch from 1."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable

Rate = Callable[[int, int], float]  # (epoch, step) -> learning rate


def step_rate(start: float, gamma: float, milestones: tuple[int, ...], epoch: int, step: int) -> float:
    """The rate of the whole epoch: it falls at the start of each milestone."""
    return start * gamma ** bisect.bisect_right(milestones, epoch)


def cosine_rate(start: float, first_epoch: int, epochs: int, steps_per_epoch: int, epoch: int, step: int) -> float:
    """Half a cosine from ``start`` at the first step of ``first_epoch`` to 0 where the step after the last would be.

    Loshchilov and Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", ICLR 2017, equation 5, without
    restarts. Before ``first_epoch`` it is ``start``.
    """
    done = (epoch - first_epoch) * steps_per_epoch + step - 1
    share = max(done, 0) / ((epochs - first_epoch + 1) * steps_per_epoch)
    return start * 0.5 * (1 + math.cos(math.pi * share))


def warmed_up(rate: Rate, warmup: int, steps_per_epoch: int, epoch: int, step: int) -> float:
    """``rate``, but for ``warmup`` epochs a share of it that rises linearly with every step, to all of it."""
    done = (epoch - 1) * steps_per_epoch + step
    return rate(epoch, step) * min(1.0, done / (warmup * steps_per_epoch))
