"""What SIGINT and SIGTERM do: a run saves first and then stops, anything else stops at once."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from rkd_cli.errors import Interrupted


class Stopped(BaseException):
    """SIGINT or SIGTERM: unwinds everything, so that the terminal is left as it was found."""

    kept = ""  # what the user still has


class _Asked:
    """To stop, by a first signal that a run heeds at its next step; otherwise, and for a second one, at once."""

    heeds = False
    signum = 0


def stop(signum: int, frame: FrameType | None) -> None:
    """The handler of both signals."""
    if not _Asked.heeds or _Asked.signum:
        raise Stopped(signum)
    _Asked.signum = signum
    print("rkd: stopping after this step, to save; once more stops at once", file=sys.stderr)  # noqa: T201


@contextmanager
def saving(command: str, directory: Path) -> Iterator[Callable[[], bool]]:
    """Let a run save where it stands before it stops; gives what it asks whether it should."""
    go_on = f"rkd {command} --resume --save-dir {shlex.quote(str(directory))}"
    _Asked.heeds, _Asked.signum = True, 0
    try:
        with if_stopped(f" at once: `{go_on}` goes on from where it was last saved"):
            yield lambda: _Asked.signum != 0
    except Interrupted:
        stopped = Stopped(_Asked.signum)
        stopped.kept = f", and saved: go on with `{go_on}`"
        raise stopped from None
    finally:
        _Asked.heeds = False


@contextmanager
def if_stopped(kept: str) -> Iterator[None]:
    """Have the line about an interruption say what is kept."""
    try:
        yield
    except Stopped as stopped:
        stopped.kept = kept
        raise
