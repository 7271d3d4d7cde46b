"""What a process that torchrun started knows from its environment, without importing torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

ERRORS_FILE = "RKD_SAYS"  # the variable that names the file into which started processes write their errors


def is_distributed() -> bool:
    """Whether torchrun, or a compatible launcher, has started this process and others."""
    return "RANK" in os.environ and "MASTER_ADDR" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"


def is_main_process() -> bool:
    """Whether this process prints and writes files."""
    return not is_distributed() or os.environ["RANK"] == "0"


def print_errors(lines: Sequence[str]) -> None:
    """Print to stderr, or write to ``ERRORS_FILE`` while another process may draw on the terminal."""
    if lines and is_distributed():
        with suppress(KeyError, OSError):  # plain torchrun sets no file, and the disk may be full
            Path(os.environ[ERRORS_FILE]).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            return
    for line in lines:
        print(f"rkd: {line}", file=sys.stderr)  # noqa: T201
