"""Keep freed memory in the process: without it, half of a training's processor time on Linux is page faults."""

from __future__ import annotations

import ctypes
import os
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # names of glibc's malloc.h
_MIB = 1 << 20


def keep_memory() -> bool:
    """Have glibc's malloc keep and reuse large blocks instead of returning each one to the kernel.

    glibc maps blocks above 32 MiB afresh each time, and the kernel fills them with zeros page by page. Networks on a
    CPU allocate such blocks in every step. The commands of ``rkd`` call this themselves. Call it first in a program of
    your own that trains or embeds on a CPU; memory that is freed then stays with the process. Settings of malloc in
    the environment (``MALLOC_...``, ``GLIBC_TUNABLES``) are left alone.

    Returns:
        Whether malloc was changed: False on other systems and other C libraries.
    """
    said = any(name.startswith("MALLOC_") and name.endswith("_") for name in os.environ)
    if sys.platform != "linux" or said or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018  # musl has a mallopt that does nothing
        mallopt = libc.mallopt
    except (OSError, AttributeError):
        return False
    # older versions refuse a threshold above 32 MiB
    mapped = mallopt(_MMAP_THRESHOLD, 1024 * _MIB) or mallopt(_MMAP_THRESHOLD, 32 * _MIB)
    return bool(mapped and mallopt(_TRIM_THRESHOLD, 2**31 - 1) and mallopt(_TOP_PAD, 64 * _MIB))
