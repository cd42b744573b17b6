"""Sums over kernels, corrected by whole models, against lines that are known."""

from __future__ import annotations

import pytest

from compress.search.latencies import correction


def test_a_line_through_whole_models_is_found() -> None:
    pairs = [(told, 0.03 + 1.25 * told) for told in (0.1, 0.2, 0.4, 0.8)]
    call, scale = correction(pairs)
    assert call == pytest.approx(0.03, abs=0.003)
    assert scale == pytest.approx(1.25, rel=0.01)


def test_one_model_moves_what_it_tells_and_no_more() -> None:
    call, scale = correction([(0.3, 0.45)])
    assert call + scale * 0.3 == pytest.approx(0.45, rel=0.02)
    assert 1.0 < scale < 1.5


def test_nothing_timed_leaves_what_was_known_before() -> None:
    assert correction([]) == pytest.approx((0.01, 1.15))


def test_errors_count_relative_to_what_was_timed() -> None:
    """A long model that is off by as many milliseconds moves the line less than a short one."""
    line = [(told, 1.2 * told) for told in (0.1, 0.2, 5.0, 10.0)]
    short = correction([(0.1, 0.14), *line[1:]])
    long = correction([*line[:3], (10.0, 12.02)])
    exact = correction(line)
    assert abs(short[0] - exact[0]) > 5 * abs(long[0] - exact[0])
