"""Handling of SIGINT and SIGTERM: a training saves and stops, everything else stops at once."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from rkd_cli.errors import Interrupted

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(BaseException):
    """SIGINT or SIGTERM: unwinds the stack, so that the terminal is restored."""

    outcome = ""  # what was saved


class _State:
    """Of the signals: a training stops after its next step, everything else at once."""

    run_saves_first = False
    distributed = False  # torchrun's agent sends the signal to each process; they agree before they stop
    announced = False
    signum = 0


def stop(signum: int, frame: FrameType | None) -> None:
    """The handler of both signals."""
    first = _State.signum == 0
    if _State.distributed and not first:
        return  # the agent ends remaining processes after the first exits; the user did not ask twice
    _State.signum = signum  # before raising: see ``raise_if_stopped``
    if not (first and _State.run_saves_first):
        raise Stopped(signum)
    if not _State.distributed:
        print("rkd: saving after this step, then stopping; press again to stop at once", file=sys.stderr)  # noqa: T201


@contextmanager
def blocked() -> Iterator[None]:
    """Start processes that get no signal before they have handlers of their own and ``unblock``.

    With the handlers that they start with, a signal would print a traceback.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # raises what a signal just before asks for
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def unblock() -> None:
    """Take the signals that came since this process was started while ``blocked``."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


def set_distributed() -> None:
    """Make this process stop only when all processes have agreed."""
    _State.distributed = True


def received() -> int:
    """The signal received, 0 for none."""
    return _State.signum


def agree(signum: int, announce: bool) -> bool:
    """Adopt the signal that the processes agreed on (0 for none); returns whether there is one."""
    if signum and announce and _State.distributed and not _State.announced:
        _State.announced = True
        print("rkd: saving after this step, then stopping", file=sys.stderr)  # noqa: T201
    _State.signum = signum or _State.signum
    return signum != 0


def stop_requested() -> bool:
    """Whether a signal was received."""
    return _State.signum != 0


def raise_if_stopped() -> None:
    """Raise ``Stopped`` for a signal whose exception was lost: Python only prints exceptions raised during a fork."""
    if _State.signum and not _State.run_saves_first:
        raise Stopped(_State.signum)


@contextmanager
def saving(command: str, directory: Path) -> Iterator[None]:
    """Let a training save before it stops, then raise ``Stopped``."""
    resume = f"rkd {command} --resume --save-dir {shlex.quote(str(directory))}"
    raise_if_stopped()
    _State.run_saves_first = True
    try:
        with if_stopped(f" without saving. Resume from the last save with `{resume}`."):
            yield
    except Interrupted:
        stopped = Stopped(_State.signum)
        stopped.outcome = f" and saved. Resume with `{resume}`."
        raise stopped from None
    finally:
        _State.run_saves_first = False


@contextmanager
def if_stopped(outcome: str) -> Iterator[None]:
    """Complete the message of an interruption with what was saved, unless an inner block has."""
    try:
        yield
        raise_if_stopped()
    except Stopped as stopped:
        stopped.outcome = stopped.outcome or outcome
        raise
