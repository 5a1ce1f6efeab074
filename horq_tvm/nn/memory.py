"""The C library's allocator, set for training on a CPU."""

from __future__ import annotations

import ctypes
import sys

# malloc.h of glibc
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Make this process keep the memory it frees, for the next tensor; False where the C library is not glibc.

    By default glibc gives large blocks back to the system at once, and the next step of training gets fresh pages, each
    of which costs a page fault and 4 kB of zeros: several times what an elementwise operator on it costs. A process
    that trains has no use for giving memory back. Call it once, before the first tensor.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, _NEVER))
