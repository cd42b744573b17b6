from __future__ import annotations

import math
from xml.etree import ElementTree

import pytest

from compress.report.markup import element, number
from compress.report.svg import Axis, Scale, log_ticks, nice_ticks, scale_around, text, x_axis


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (0.853, 0.895, [0.86, 0.87, 0.88, 0.89]),
        (-3, 3, [-2, 0, 2]),
        (5, 5, [5]),
    ],
)
def test_nice_ticks(low: float, high: float, ticks: list[float]) -> None:
    assert nice_ticks(low, high) == ticks


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.9, 1100, [1, 10, 100, 1000]),
        (4e6, 1.2e8, [1e7, 3e7, 1e8]),
        (1, 11, [1, 3, 10]),
        (2.05, 2.6, [2.2, 2.4, 2.6]),
    ],
)
def test_log_ticks(low: float, high: float, ticks: list[float]) -> None:
    assert log_ticks(low, high) == pytest.approx(ticks)


def test_many_decades_are_thinned() -> None:
    assert len(log_ticks(1e-6, 1e9)) <= 6


def test_a_linear_scale_maps_its_ends_and_clips() -> None:
    scale = Scale(0, 10, 300, 100)
    assert [scale(0), scale(2.5), scale(10), scale(99)] == [300, 250, 100, 100]


def test_a_logarithmic_scale_maps_the_geometric_mean_to_the_middle() -> None:
    scale = Scale(1, 100, 0, 200, True)
    assert scale(10) == pytest.approx(100)
    assert scale(math.sqrt(10)) == pytest.approx(50)


def test_scales_hold_their_values_with_a_margin() -> None:
    assert scale_around([2, 12], 0, 1, margin=0.1) == Scale(1, 13, 0, 1)
    one = scale_around([5.0], 0, 100)
    assert one.low < 5 < one.high
    assert one(5) == pytest.approx(50)
    single = scale_around([5.0], 0, 100, logarithmic=True)
    assert single(5) == pytest.approx(50)


def test_an_axis_draws_each_tick_at_its_coordinate() -> None:
    markup = x_axis(Axis(Scale(0, 10, 100, 200), "Bytes", lambda value: f"{value:g}"), 10, 90)
    root = ElementTree.fromstring(f"<g>{markup}</g>")
    lines = [(line.get("x1"), line.get("y1"), line.get("y2")) for line in root.iter("line")][:-1]
    assert lines == [(str(x), "10", "90") for x in (100, 120, 140, 160, 180, 200)]
    assert [item.text for item in root.iter("text")] == ["0", "2", "4", "6", "8", "10", "Bytes"]


def test_text_and_attributes_are_escaped() -> None:
    assert text(1, 2, "<b>&") == '<text x="1" y="2" text-anchor="middle">&lt;b&gt;&amp;</text>'
    assert element("g", {"aria-label": '"><script>', "class": None}) == (
        '<g aria-label="&quot;&gt;&lt;script&gt;"></g>'
    )


def test_coordinates_are_short() -> None:
    assert [number(value) for value in (1.0, 1.256, -0.001, 100)] == ["1", "1.26", "0", "100"]
