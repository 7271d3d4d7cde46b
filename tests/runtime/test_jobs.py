"""Several processes at once."""

from __future__ import annotations

import os
import signal
from functools import partial

import pytest

from rkd_cli.runtime.jobs import run_jobs


class _Interrupted:
    """A job whose process gets Ctrl-C when it reads the job, before it has handlers of its own."""

    def __reduce__(self) -> tuple[object, ...]:
        return _interrupt, ()


def _interrupt() -> partial[None]:
    os.kill(os.getpid(), signal.SIGINT)
    return partial(print, "worked", flush=True)


def test_a_process_that_starts_leaves_ctrl_c_to_its_parent(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_jobs({"one": _Interrupted()}, 1) == 0  # type: ignore[dict-item]
    assert capfd.readouterr() == ("worked\n", "")
