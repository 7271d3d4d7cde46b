"""Seconds that a piece of work takes, by torch's own timer."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

# the timer can also time C++, and imports what warns where a compiler for CUDA is installed and no GPU
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
from torch.utils.benchmark import Timer as Timer  # noqa: E402


def times_of(work: Callable[[], object], seconds: float, threads: int | None = None) -> list[float]:
    """Seconds of each run, over so many seconds and at least once, after runs that warm up.

    Very short runs are timed in blocks, whose mean counts. The timer waits for a GPU before and after each block.

    Args:
        work: to be timed.
        seconds: to repeat it for.
        threads: of torch while it runs; None: as many as torch has.
    """
    timer = Timer("work()", globals={"work": work}, num_threads=threads or torch.get_num_threads())
    return list(timer.blocked_autorange(min_run_time=seconds).times)
