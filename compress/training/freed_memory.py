"""Keeping the memory of freed tensors at hand: training frees and asks for the same large blocks at every step."""

from __future__ import annotations

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
"""Parameters of glibc's mallopt(3), by their numbers in malloc.h."""
_OURS = {
    _TRIM_THRESHOLD: ("MALLOC_TRIM_THRESHOLD_", (1 << 31) - 1),
    _MMAP_THRESHOLD: ("MALLOC_MMAP_THRESHOLD_", 1 << 30),
    _MMAP_MAX: ("MALLOC_MMAP_MAX_", 0),
}


def keep_freed_memory() -> bool:
    """Let glibc serve large tensors from memory that it has, for the rest of the process; whether it could be asked.

    By default each of them is mapped anew, and its pages are zeroed one by one as they are first touched: a sixth of a
    training step of a small language model. What the environment says of malloc already is left as it is; allocators
    without ``mallopt`` are left alone.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    heeded = [mallopt(number, value) for number, (variable, value) in _OURS.items() if variable not in os.environ]
    return 0 not in heeded
