"""Learning rate schedules. Epochs and steps count from 1."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable

LearningRate = Callable[[int, int], float]  # of (epoch, step)


def step_rate(start: float, gamma: float, milestones: tuple[int, ...], epoch: int, step: int) -> float:
    """``start``, multiplied by ``gamma`` at the start of each milestone epoch."""
    return start * gamma ** bisect.bisect_right(milestones, epoch)


def cosine_rate(start: float, first_epoch: int, epochs: int, steps_per_epoch: int, epoch: int, step: int) -> float:
    """Half a cosine from ``start`` at the first step of ``first_epoch`` to 0 one step after the last.

    Loshchilov and Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", ICLR 2017, equation 5, without
    restarts. Before ``first_epoch`` it is ``start``.
    """
    done = (epoch - first_epoch) * steps_per_epoch + step - 1
    fraction = max(done, 0) / ((epochs - first_epoch + 1) * steps_per_epoch)
    return start * 0.5 * (1 + math.cos(math.pi * fraction))


def warmed_up(schedule: LearningRate, warmup: int, steps_per_epoch: int, epoch: int, step: int) -> float:
    """``schedule``, times a factor that rises linearly to 1 over ``warmup`` epochs."""
    done = (epoch - 1) * steps_per_epoch + step
    return schedule(epoch, step) * min(1.0, done / (warmup * steps_per_epoch))
