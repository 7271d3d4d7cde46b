"""The one way any file reaches the disk: written aside, flushed, renamed into place."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError

from rkd_cli.errors import RunError


def write_text(path: Path, text: str) -> None:
    """Put a text file in place, whole or not at all.

    Raises:
        RunError: the disk is full, or the folder read-only or gone.
    """
    replace_file(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: object) -> None:
    """``write_text`` of indented JSON.

    Raises:
        RunError: the disk is full, or the folder read-only or gone.
    """
    write_text(path, json.dumps(value, indent=2) + "\n")


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write aside, flush to the disk, rename into place.

    Raises:
        RunError: the disk is full, or the folder read-only or gone.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        # safetensors, newer and older, wraps the system's words in its own
        said = re.search(r'I/O error: (.+?) \(os error|message: "(.+?)"', reason)
        reason = (said[1] or said[2]) if said else reason
        raise RunError(f"{path}: cannot be written ({reason}): what stood there before is whole") from None
    except BaseException:  # a second signal
        partial.unlink(missing_ok=True)
        raise
