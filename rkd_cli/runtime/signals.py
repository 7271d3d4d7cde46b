"""What SIGINT and SIGTERM do: a run saves first and then stops, anything else stops at once."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from rkd_cli.errors import Interrupted


class Stopped(BaseException):
    """SIGINT or SIGTERM: unwinds everything, so that the terminal is left as it was found."""

    kept = ""  # what the user still has


class _Asked:
    """To stop: by a first signal, which a run heeds at its next step, and anything else at once."""

    run_saves_first = False
    one_of_many = False  # processes, which agree first; torchrun's agent sends each of them the signal that it gets
    said = False  # that it stops, where they have agreed on it
    signum = 0


def stop(signum: int, frame: FrameType | None) -> None:
    """The handler of both signals."""
    first = _Asked.signum == 0
    if _Asked.one_of_many and not first:
        return  # the agent ends those that are left when the first one has ended: that is no second wish
    _Asked.signum = signum  # before anything is raised: see ``raise_if_asked``
    if not (first and _Asked.run_saves_first):
        raise Stopped(signum)
    if not _Asked.one_of_many:
        print("rkd: stopping after this step, to save; once more stops at once", file=sys.stderr)  # noqa: T201


def take_turns() -> None:
    """This process is one of many: what a signal asks for is done when all have agreed, and said once."""
    _Asked.one_of_many = True


def asked() -> int:
    """The signal that has come, 0 for none."""
    return _Asked.signum


def heard(signum: int, speaks: bool) -> bool:
    """Take over what a signal has asked of one of many processes; gives whether one has come.

    Args:
        signum: that they have agreed on, 0 for none.
        speaks: whether this one says so.
    """
    if signum and speaks and _Asked.one_of_many and not _Asked.said:
        _Asked.said = True
        print("rkd: stopping after this step, to save", file=sys.stderr)  # noqa: T201
    _Asked.signum = signum or _Asked.signum
    return signum != 0


def stop_requested() -> bool:
    """Whether a signal has come."""
    return _Asked.signum != 0


def raise_if_asked() -> None:
    """Stop now, if a signal has come whose exception was lost: what is raised while a process forks is only printed.

    Raises:
        Stopped: where a signal has come and no run is there to save first.
    """
    if _Asked.signum and not _Asked.run_saves_first:
        raise Stopped(_Asked.signum)


@contextmanager
def saving(command: str, directory: Path) -> Iterator[None]:
    """Let a run save where it stands before it stops.

    Raises:
        Stopped: it was asked to stop, and has.
    """
    go_on = f"rkd {command} --resume --save-dir {shlex.quote(str(directory))}"
    raise_if_asked()
    _Asked.run_saves_first = True
    try:
        with if_stopped(f" at once: `{go_on}` goes on from where it was last saved"):
            yield
    except Interrupted:
        stopped = Stopped(_Asked.signum)
        stopped.kept = f", and saved: go on with `{go_on}`"
        raise stopped from None
    finally:
        _Asked.run_saves_first = False


@contextmanager
def if_stopped(kept: str) -> Iterator[None]:
    """Have the line about an interruption say what is kept, where nothing inside has said it.

    Raises:
        Stopped: as it came.
    """
    try:
        yield
        raise_if_asked()
    except Stopped as stopped:
        stopped.kept = stopped.kept or kept
        raise
