from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.numerics.roofline import Roof, TimeBound, bottleneck, least_time

ROOF = Roof(bytes_per_s=10e9, fp32_per_s=100e9, int8_per_s=400e9)
AMOUNT = st.floats(1, 1e15)


def test_arithmetic_binds_above_the_ridge() -> None:
    """1 GFLOP and 10 MB: 10 ms of arithmetic, 1 ms of memory."""
    assert least_time(ROOF, 1e9, 0, 10e6) == TimeBound(pytest.approx(0.010), pytest.approx(0.001))
    assert least_time(ROOF, 1e9, 0, 10e6).seconds == pytest.approx(0.010)


def test_memory_binds_below_the_ridge() -> None:
    """10 MFLOP and 100 MB: 0.1 ms of arithmetic, 10 ms of memory."""
    assert least_time(ROOF, 10e6, 0, 100e6).seconds == pytest.approx(0.010)


def test_both_classes_of_arithmetic_add_up() -> None:
    """1 GFLOP takes 10 ms and 2 GOP of 8 bits 5 ms."""
    assert least_time(ROOF, 1e9, 2e9, 0).compute_s == pytest.approx(0.015)


def test_at_the_ridge_both_take_as_long() -> None:
    assert least_time(ROOF, 10 * 1e6, 0, 1e6).compute_s == pytest.approx(least_time(ROOF, 10 * 1e6, 0, 1e6).memory_s)
    assert least_time(ROOF, 0, 40 * 1e6, 1e6).compute_s == pytest.approx(least_time(ROOF, 0, 40 * 1e6, 1e6).memory_s)


@given(AMOUNT, AMOUNT, AMOUNT)
def test_the_attainable_rate_is_that_of_the_paper(operations: float, moved: float, factor: float) -> None:
    """Operations over the least time = min(peak, bandwidth · intensity)."""
    roof = Roof(factor, 1e11, 4e11)
    attainable = min(roof.fp32_per_s, roof.bytes_per_s * operations / moved)
    assert operations / least_time(roof, operations, 0, moved).seconds == pytest.approx(attainable)


@pytest.mark.parametrize(
    ("compute", "memory", "measured", "side"),
    [
        (0.5, 0.2, 1.0, "compute"),
        (0.2, 0.5, 1.0, "memory"),
        (0.2, 0.13, 1.0, "overhead"),
        (0.2, 0.14, 1.0, "compute"),
        (0.0, 0.0, 1.0, "overhead"),
        (0.0, 1 / 3, 1.0, "memory"),
    ],
)
def test_which_side_binds(compute: float, memory: float, measured: float, side: str) -> None:
    assert bottleneck(compute, memory, measured) == side


@pytest.mark.parametrize("roof", [Roof(0, 1, 1), Roof(1, -1, 1), Roof(1, 1, 0)])
def test_a_roof_of_nothing_is_refused(roof: Roof) -> None:
    with pytest.raises(ValueError, match="above 0"):
        least_time(roof, 1, 1, 1)
