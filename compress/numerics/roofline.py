"""The roofline model: how fast a machine could do work at best (Williams, Waterman and Patterson 2009, section 3)."""

from __future__ import annotations

from typing import Literal, NamedTuple

Binds = Literal["compute", "memory", "overhead"]
"""What keeps work from being done faster; *overhead* where neither limit explains a third of the time."""

_EXPLAINED = 1 / 3


class Roof(NamedTuple):
    """What a machine does in a second at best: bytes moved, float operations, operations on 8-bit integers."""

    bytes_per_s: float
    fp32_per_s: float
    int8_per_s: float


class Limit(NamedTuple):
    """The least time that a piece of work needs for its arithmetic and for its bytes."""

    compute_s: float
    memory_s: float

    @property
    def seconds(self) -> float:
        """Both go on at once, so the longer of the two."""
        return max(self.compute_s, self.memory_s)


def limit(roof: Roof, fp32_operations: float, int8_operations: float, moved_bytes: float) -> Limit:
    """The least time for that work: max(fp32 / P_fp32 + int8 / P_int8, bytes / bandwidth).

    The two classes of arithmetic share the processor's units, so their times add up.
    """
    if min(roof) <= 0:
        raise ValueError(f"expected a roof above 0, found {roof}")
    compute = fp32_operations / roof.fp32_per_s + int8_operations / roof.int8_per_s
    return Limit(compute, moved_bytes / roof.bytes_per_s)


def binds(compute_bound_s: float, memory_bound_s: float, measured_s: float) -> Binds:
    """Which side binds work that took ``measured_s``.

    The other two are the least times of its parts, summed over those that arithmetic bounds and those that memory does.
    """
    if compute_bound_s + memory_bound_s < _EXPLAINED * measured_s:
        return "overhead"
    return "compute" if compute_bound_s >= memory_bound_s else "memory"
