"""One process of many, as torchrun starts them, by its environment alone: who speaks, and how it ends."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

SAYS = "RKD_SAYS"  # names the file for the last words of processes, of the one that started them and has the last


def is_one_of_many() -> bool:
    """Whether torchrun, or whoever speaks as it does, has started this process and others."""
    return "RANK" in os.environ and "MASTER_ADDR" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"


def speaks() -> bool:
    """Whether this process is the one that draws and writes."""
    return not is_one_of_many() or os.environ["RANK"] == "0"


def say(lines: Sequence[str]) -> None:
    """Complain on the terminal, or, while others may draw there, in the file that ``SAYS`` names."""
    if lines and is_one_of_many():
        with suppress(KeyError, OSError):  # torchrun names none, and a full disk takes none
            Path(os.environ[SAYS]).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            return
    for line in lines:
        print(f"rkd: {line}", file=sys.stderr)  # noqa: T201


def end(code: int, lines: Sequence[str]) -> NoReturn:
    """End this process; of many, like the first that failed, which alone says why.

    Args:
        code: its exit code.
        lines: why it fails.
    """
    if not is_one_of_many():
        say(lines)
        sys.exit(code)
    from rkd_cli.runtime.distributed import conclude, leave

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)  # it ends already
    if code:
        code, is_first = conclude(code)
        say(lines if is_first else ())
    else:
        leave()
    with suppress(BrokenPipeError):
        sys.stdout.flush()
    os._exit(code)  # at a usual exit gloo's threads may outlive what they belong to, and the process aborts
