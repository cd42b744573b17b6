"""Keeping the memory of freed tensors at hand, where the same large blocks are freed and asked for again and again."""

from __future__ import annotations

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
"""Parameters of glibc's mallopt(3), by their numbers in malloc.h."""
_VARIABLES = {
    _TRIM_THRESHOLD: "MALLOC_TRIM_THRESHOLD_",
    _MMAP_THRESHOLD: "MALLOC_MMAP_THRESHOLD_",
    _MMAP_MAX: "MALLOC_MMAP_MAX_",
}
_UNLIMITED = {_TRIM_THRESHOLD: (1 << 31) - 1, _MMAP_THRESHOLD: 1 << 30, _MMAP_MAX: 0}
_KEPT_SHARE = 4


def keep_freed_memory(largest_bytes: int | None = None) -> bool:
    """Let glibc serve large tensors from memory that it has, for the rest of the process; whether it could be asked.

    By default each of them is mapped anew, and its pages are zeroed one by one as they are first touched: a sixth of a
    training step of a small language model. With ``largest_bytes`` that holds for tensors up to that size, and no more
    than four times as much is kept at the end of the heap. What the environment says of malloc already is left as it
    is; allocators without ``mallopt`` are left alone.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    thresholds = _UNLIMITED
    if largest_bytes is not None:
        thresholds = {_TRIM_THRESHOLD: _KEPT_SHARE * largest_bytes, _MMAP_THRESHOLD: largest_bytes}
    heeded = [mallopt(number, value) for number, value in thresholds.items() if _VARIABLES[number] not in os.environ]
    return 0 not in heeded


def give_back_freed_memory() -> bool:
    """Give what was freed and kept at hand back to the system; whether there was any."""
    try:
        return bool(ctypes.CDLL(None).malloc_trim(0))
    except (AttributeError, OSError, TypeError):
        return False
