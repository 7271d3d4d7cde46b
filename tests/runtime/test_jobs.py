"""Several processes at once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest

from rkd_cli.runtime import signals
from rkd_cli.runtime.jobs import run_jobs


class _Signalled:
    """A job whose process gets a signal when it reads the job, before it has handlers of its own."""

    def __init__(self, signum: int) -> None:
        self.signum = signum

    def __reduce__(self) -> tuple[object, ...]:
        return _signal, (self.signum,)


def _signal(signum: int) -> partial[None]:
    os.kill(os.getpid(), signum)
    return partial(print, "worked", flush=True)


def test_a_process_that_starts_leaves_ctrl_c_to_its_parent(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_jobs({"one": _Signalled(signal.SIGINT)}, 1) == 0  # type: ignore[dict-item]
    assert capfd.readouterr() == ("worked\n", "")


def test_a_process_that_starts_ends_at_sigterm_without_a_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_jobs({"one": _Signalled(signal.SIGTERM)}, 1) == 143  # type: ignore[dict-item]
    assert capfd.readouterr() == ("", "")


def test_a_signal_between_two_starts_ends_those_that_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second process is made, but does not run yet."""
    calls = []

    @contextmanager
    def stopped_at_the_second() -> Iterator[None]:
        calls.append(1)
        if len(calls) == 2:
            raise signals.Stopped(signal.SIGTERM)
        yield

    monkeypatch.setattr(signals, "blocked", stopped_at_the_second)
    with pytest.raises(signals.Stopped):
        run_jobs({"one": partial(time.sleep, 600), "two": partial(print)}, 2)
    assert not multiprocessing.active_children()
