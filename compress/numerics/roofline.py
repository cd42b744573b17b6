"""Roofline model: a lower bound on the time of a computation (Williams, Waterman and Patterson 2009, section 3)."""

from __future__ import annotations

from typing import Literal, NamedTuple

Bottleneck = Literal["compute", "memory", "overhead"]
"""Resource that limits the speed; *overhead* if neither resource explains a third of the time."""

_EXPLAINED = 1 / 3


class Roof(NamedTuple):
    """Peak rates of a machine per second: bytes moved, float operations, operations on 8-bit integers."""

    bytes_per_s: float
    fp32_per_s: float
    int8_per_s: float


class TimeBound(NamedTuple):
    """Lower bounds on the time of a computation by its arithmetic and by its memory traffic."""

    compute_s: float
    memory_s: float

    @property
    def seconds(self) -> float:
        """Return the larger bound, since both run concurrently."""
        return max(self.compute_s, self.memory_s)


def least_time(roof: Roof, fp32_operations: float, int8_operations: float, moved_bytes: float) -> TimeBound:
    """Return the lower bounds on a computation's time: fp32 / P_fp32 + int8 / P_int8, and bytes / bandwidth.

    Both kinds of arithmetic share the processor's units, so their times add up.

    Args:
        roof: Peak rates of the machine.
        fp32_operations: Number of float operations.
        int8_operations: Number of operations on 8-bit integers.
        moved_bytes: Bytes read and written.
    """
    if min(roof) <= 0:
        raise ValueError(f"expected a roof above 0, found {roof}")
    compute = fp32_operations / roof.fp32_per_s + int8_operations / roof.int8_per_s
    return TimeBound(compute, moved_bytes / roof.bytes_per_s)


def bottleneck(compute_bound_s: float, memory_bound_s: float, measured_s: float) -> Bottleneck:
    """Return the resource that limits a computation of ``measured_s``.

    The other two arguments are the lower bounds of its parts, summed over compute-bound and over memory-bound parts.
    """
    if compute_bound_s + memory_bound_s < _EXPLAINED * measured_s:
        return "overhead"
    return "compute" if compute_bound_s >= memory_bound_s else "memory"
