"""Worker processes, which decode images ahead of use."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from rkd_cli.errors import RunError, first_line
from rkd_cli.runtime.signals import blocked, raise_if_stopped, unblock

TIME_LIMIT = 600.0  # seconds for a batch, more than any sleeping disk or network folder takes


def in_workers(work: Callable[[Any], Any], plan: Iterable[Any], workers: int) -> Iterator[Any]:
    """Yield ``work(item)`` for each item of ``plan`` in order, computed ahead by worker processes (0: in this process).

    ``work`` must return no tensors: they would pass through /dev/shm, which has 64 MB in a container, and a worker that
    finds no space there hangs. Raises a RunError if a worker fails or times out.
    """
    if not workers:
        for item in plan:
            raise_if_stopped()
            yield work(item)
        return
    loader = DataLoader(
        _Work(work),
        batch_size=None,
        sampler=plan,
        num_workers=workers,
        collate_fn=_as_is,
        timeout=TIME_LIMIT,
        worker_init_fn=_leave_signals_to_the_parent,
        generator=torch.Generator(),  # by default each start draws from torch's global generator
    )
    try:
        with blocked():
            results = iter(loader)
        for result in results:
            raise_if_stopped()
            yield result
    except (RuntimeError, OSError) as error:
        reason = first_line(error)
        raise RunError(f"the workers that decode images failed ({reason}). Try fewer --workers, or 0.") from error


class _Work(Dataset[Any]):
    def __init__(self, work: Callable[[Any], Any]) -> None:
        self._work = work

    def __getitem__(self, item: Any) -> Any:
        return self._work(item)


def _as_is(result: Any) -> Any:
    return result


def _leave_signals_to_the_parent(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group
    # torchrun's agent also sends SIGTERM to the whole group, and the run needs its workers for the last step
    signal.signal(signal.SIGTERM, signal.SIG_IGN if "TORCHELASTIC_RUN_ID" in os.environ else signal.SIG_DFL)
    unblock()
