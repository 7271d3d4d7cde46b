"""Reuse freed memory within the process: on Linux, half of a training's CPU time would be page faults."""

from __future__ import annotations

import ctypes
import os
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # names of glibc's malloc.h
_MIB = 1 << 20


def keep_memory() -> bool:
    """Make glibc's malloc reuse large blocks instead of returning each one to the kernel.

    By default glibc maps blocks above 32 MiB again each time, and the kernel zeroes them page by page. CPU networks
    allocate such blocks in every step. The ``rkd`` commands call this themselves. Call it first in your own programs
    that train or embed on a CPU. The process then never shrinks. Environment variables that configure malloc
    (``MALLOC_...``, ``GLIBC_TUNABLES``) take precedence.

    Returns:
        Whether malloc was configured; False on other systems and C libraries.
    """
    configured = any(name.startswith("MALLOC_") and name.endswith("_") for name in os.environ)
    if sys.platform != "linux" or configured or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018  # musl has a mallopt that does nothing
        mallopt = libc.mallopt
    except (OSError, AttributeError):
        return False
    # older versions reject a threshold above 32 MiB
    mapped = mallopt(_MMAP_THRESHOLD, 1024 * _MIB) or mallopt(_MMAP_THRESHOLD, 32 * _MIB)
    return bool(mapped and mallopt(_TRIM_THRESHOLD, 2**31 - 1) and mallopt(_TOP_PAD, 64 * _MIB))
