"""Work that processes do ahead of who wants it: pixels are decoded there."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from rkd_cli.errors import RunError, first_line
from rkd_cli.runtime.signals import raise_if_asked

TIME_LIMIT = 600.0  # seconds for a batch: a disk that sleeps or a network folder may be slow, but not that slow


def in_workers(work: Callable[[Any], Any], plan: Iterable[Any], workers: int) -> Iterator[Any]:
    """``work`` on each item of ``plan``, in order, done ahead by ``workers`` processes; here, where there are none.

    What ``work`` returns comes through a pipe. It must hold no tensor: those would come through /dev/shm, which is
    64 MB in a container, and one that finds no room there is never heard of.

    Raises:
        Stopped: a signal has asked for it.
        RunError: a process was killed, gave nothing within ``TIME_LIMIT``, or could not be started.
    """
    if not workers:
        for item in plan:
            raise_if_asked()
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
        generator=torch.Generator(),  # or each start would draw from the generator that the whole process shares
    )
    try:
        for result in loader:
            raise_if_asked()
            yield result
    except (RuntimeError, OSError) as error:
        reason = first_line(error)
        raise RunError(f"the processes that decode images failed ({reason}): try fewer --workers, or 0") from error


class _Work(Dataset[Any]):
    def __init__(self, work: Callable[[Any], Any]) -> None:
        self._work = work

    def __getitem__(self, item: Any) -> Any:
        return self._work(item)


def _as_is(result: Any) -> Any:
    return result


def _leave_signals_to_the_parent(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group
    # torchrun's agent sends it to the whole group, to which a run answers by a last step and saving
    signal.signal(signal.SIGTERM, signal.SIG_IGN if "TORCHELASTIC_RUN_ID" in os.environ else signal.SIG_DFL)
