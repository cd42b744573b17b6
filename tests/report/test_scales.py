from __future__ import annotations

import math
from itertools import combinations
from xml.etree import ElementTree

import pytest

from compress.report.plot import (
    CHARACTER,
    LINE,
    SMALL,
    Box,
    Frame,
    Plot,
    Scale,
    element,
    log_ticks,
    nice_ticks,
    scale_around,
    text,
)


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


def test_a_logarithmic_scale_maps_the_geometric_mean_to_the_middle() -> None:
    scale = Scale(1, 100, 0, 200, True)
    assert scale(10) == pytest.approx(100)
    assert scale(math.sqrt(10)) == pytest.approx(50)


def test_scales_hold_their_values_with_a_margin() -> None:
    assert scale_around([2, 12], 0, 1, margin=0.1) == Scale(1, 13, 0, 1)
    around_five = scale_around([5.0], 0, 100)
    assert around_five.low < 5 < around_five.high
    assert around_five(5) == pytest.approx(50)
    single = scale_around([5.0], 0, 100, logarithmic=True)
    assert single(5) == pytest.approx(50)


def test_an_axis_draws_each_tick_at_its_coordinate() -> None:
    plot = Plot(Frame(300, 120, 100, 200, 10, 90), Scale(0, 10, 100, 200), Scale(0, 1, 90, 10))
    plot.x_axis("Bytes", lambda value: f"{value:g}")
    root = ElementTree.fromstring(plot.svg("made up"))
    lines = [(line.get("x1"), line.get("y1"), line.get("y2")) for line in root.iter("line")][:-1]
    assert lines == [(str(x), "10", "90") for x in (100, 120, 140, 160, 180, 200)]
    assert [item.text for item in root.iter("text")] == ["0", "2", "4", "6", "8", "10", "Bytes"]


def test_text_and_attributes_are_escaped() -> None:
    assert text(1, 2, "<b>&") == '<text x="1" y="2" text-anchor="middle">&lt;b&gt;&amp;</text>'
    assert element("g", {"aria-label": '"><script>', "class": None}, "<i>") == (
        '<g aria-label="&#34;&gt;&lt;script&gt;">&lt;i&gt;</g>'
    )


def test_labels_keep_clear_of_marks_lines_names_and_each_other() -> None:
    plot = Plot(SMALL, Scale(0, 100, SMALL.left, SMALL.right), Scale(0, 100, SMALL.bottom, SMALL.top))
    plot.add(plot.line([(20, 50), (80, 50)], "front"))
    plot.name(*plot.at((50, 56)), "a name", "roof-name")
    places = [(48.0, 50.0), (50.0, 51.0), (52.0, 50.0)]
    for values in places:
        plot.add(plot.dot(values, 3, "point", "words"))
    plot.labels([(values, f"label {index}", "label") for index, values in enumerate(places)])
    root = ElementTree.fromstring(plot.svg("made up"))
    boxes = []
    for label in root.iter("text"):
        x, y, half = float(label.get("x", "")), float(label.get("y", "")), len(label.text or "") * CHARACTER / 2
        boxes.append(Box(x - half, y + 4 - LINE, x + half, y + 4))
    assert len(boxes) == 4
    assert not any(label_box.overlap(other) for label_box, other in combinations(boxes, 2))
    for circle in root.iter("circle"):
        x, y = float(circle.get("cx", "")), float(circle.get("cy", ""))
        assert not any(box.left < x < box.right and box.top < y < box.bottom for box in boxes)
    height = plot.y(50)
    assert not any(box.top < height < box.bottom and box.right > plot.x(20) and box.left < plot.x(80) for box in boxes)
