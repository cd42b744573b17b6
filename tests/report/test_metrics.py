"""Tests of metric formatting, scales and charts."""

from __future__ import annotations

import math
from itertools import combinations
from xml.etree import ElementTree

import pytest

from compress.report.charts import TradeOffPoint, latency_by_length, latency_curves, pareto, percentile, trade_off
from compress.report.plot import (
    CHARACTER,
    LINE,
    SMALL,
    Box,
    Plot,
    Scale,
    log_ticks,
    nice_ticks,
    scale_around,
)
from compress.report.rows import UNNAMED, group_by_module, module_of
from compress.results.formatting import (
    format_improvement,
    format_measurement,
    format_value,
)
from compress.results.metrics import describe_metric, main_metrics, other_metrics, quality_metric
from compress.results.report import LayerBytes, Measurement, Report


@pytest.mark.parametrize(
    ("name", "unit", "value", "text"),
    [
        ("accuracy", "ratio", 0.8735, "87.35%"),
        ("accuracy", "%", 87.35, "87.35%"),
        ("exact_match", "ratio", 0.5, "50.00%"),
        ("latency_ms", "ms", 0.2314, "0.231 ms"),
        ("latency_ms", "ms", 12_300, "12.3 s"),
        ("parameters", "parameters", 22_713_728, "22.7 M"),
        ("throughput", "examples/s", 5772.4, "5,772 examples/s"),
        ("speedup", "x", 11.72, "11.7x"),
        ("made_up", "widgets", 3.14159, "3.14 widgets"),
    ],
)
def test_values_carry_their_unit(name: str, unit: str, value: float, text: str) -> None:
    assert format_value(describe_metric(name, unit), value) == text


@pytest.mark.parametrize(
    ("name", "value", "reference", "text"),
    [
        ("size_bytes", 5.0, 100.0, "20.0x smaller"),
        ("size_bytes", 100.0, 50.0, "2.00x larger"),
        ("latency_ms", 0.5, 3.0, "6.00x faster"),
        ("throughput", 10.0, 5.0, "2.00x more"),
        ("accuracy", 0.788, 0.80, "98.50%"),
        ("parameters", 10.0, 10.0, "same"),
        ("agreement", 0.9, 1.0, ""),
        ("latency_ms", 1.0, 0.0, ""),
    ],
)
def test_improvement_words(name: str, value: float, reference: float, text: str) -> None:
    assert format_improvement(describe_metric(name), value, reference) == text


def test_an_interval_names_a_shared_unit_once() -> None:
    row = {"model": "final", "target": "cpu", "unit": "ms", "metric": "latency_ms"}
    assert format_measurement(Measurement(value=2.71, low=2.67, high=2.75, **row)) == "2.71 ms (2.67\u20132.75 ms)"
    wide = {**row, "metric": "size_bytes", "unit": "bytes"}
    assert format_measurement(Measurement(value=2000, low=900, high=3000, **wide)) == "2.00 kB (900 B\u20133.00 kB)"


def test_main_and_other_metrics_cover_each_metric_once() -> None:
    units = {"zeta": "", "latency_ms": "ms", "latency_ms_length_9_16": "ms", "accuracy": "ratio", "size_bytes": "bytes"}
    main = [metric.name for metric in main_metrics(units)]
    assert main == ["accuracy", "size_bytes", "latency_ms"]
    assert [metric.name for metric in other_metrics(units)] == ["zeta", "latency_ms_length_9_16"]


def test_quality_metric_prefers_the_tasks_own_over_agreement() -> None:
    quality = quality_metric({"agreement": "ratio", "size_bytes": "bytes", "word_error_rate": "ratio"})
    assert quality is not None
    assert (quality.name, quality.better) == ("word_error_rate", "lower")
    fallback = quality_metric({"agreement": "ratio"})
    assert fallback is not None
    assert fallback.name == "agreement"
    assert quality_metric({"size_bytes": "bytes"}) is None


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0, 10, [0, 2, 4, 6, 8, 10]), (0.853, 0.895, [0.86, 0.87, 0.88, 0.89]), (-3, 3, [-2, 0, 2]), (5, 5, [5])],
)
def test_nice_ticks(low: float, high: float, ticks: list[float]) -> None:
    assert nice_ticks(low, high) == ticks


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0.9, 1100, [1, 10, 100, 1000]), (4e6, 1.2e8, [1e7, 3e7, 1e8]), (1, 11, [1, 3, 10]), (2.05, 2.6, [2.2, 2.4, 2.6])],
)
def test_log_ticks(low: float, high: float, ticks: list[float]) -> None:
    assert log_ticks(low, high) == pytest.approx(ticks)


def test_ticks_of_many_decades_are_thinned() -> None:
    assert len(log_ticks(1e-6, 1e9)) <= 6


def test_a_logarithmic_scale_maps_the_geometric_mean_to_the_middle() -> None:
    scale = Scale(1, 100, 0, 200, True)
    assert scale(10) == pytest.approx(100)
    assert scale(math.sqrt(10)) == pytest.approx(50)


def test_scales_contain_their_values_with_a_margin() -> None:
    assert scale_around([2, 12], 0, 1, margin=0.1) == Scale(1, 13, 0, 1)
    around_five = scale_around([5.0], 0, 100)
    assert around_five.low < 5 < around_five.high
    assert around_five(5) == pytest.approx(50)
    single = scale_around([5.0], 0, 100, logarithmic=True)
    assert single(5) == pytest.approx(50)


def test_labels_do_not_overlap_anything() -> None:
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


QUALITY, SIZE = describe_metric("accuracy", "ratio"), describe_metric("size_bytes", "bytes")


def row(model: str, metric: str, value: float, **more: object) -> Measurement:
    fields = {"model": model, "metric": metric, "target": "cpu", "value": value, "unit": "", **more}
    return Measurement.model_validate(fields)


def point(name: str, cost: float, quality: float) -> TradeOffPoint:
    return TradeOffPoint((name,), row(name, "size_bytes", cost), row(name, "accuracy", quality))


def test_pareto_front_has_only_non_dominated_points() -> None:
    points = [point("a", 1, 0.5), point("b", 2, 0.4), point("c", 3, 0.7), point("d", 3, 0.6), point("e", 9, 0.7)]
    assert [p.models[0] for p in pareto(points, higher=True)] == ["a", "c"]
    assert [p.models[0] for p in pareto(points, higher=False)] == ["a", "b"]


def test_marks_are_at_the_scaled_positions() -> None:
    rows = [row("baseline", "accuracy", 0.9), row("final", "accuracy", 0.8),
            row("baseline", "size_bytes", 1e8), row("final", "size_bytes", 1e6)]  # fmt: skip
    drawing = trade_off(Report(recipe="r", measurements=tuple(rows)), "cpu", QUALITY, SIZE)
    assert drawing is not None
    root = ElementTree.fromstring(drawing)
    square, diamond = root.find(".//rect"), root.find(".//path")
    assert square is not None
    assert diamond is not None
    # Log axis 56..466 with a margin of 0.12 of the span on both sides: 1e8 lies at 56 + 410 * 1.12 / 1.24.
    assert float(square.get("x", "")) + 5.5 == pytest.approx(56 + 410 * 1.12 / 1.24, abs=0.01)
    # Linear axis 298..34 with a margin of 0.1: 0.9 lies at 298 - 264 * 1.1 / 1.2.
    assert float(square.get("y", "")) + 5.5 == pytest.approx(298 - 264 * 1.1 / 1.2, abs=0.01)
    assert diamond.get("d", "").startswith(f"M{56 + 410 * 0.12 / 1.24:.2f} ")


def test_a_model_measured_twice_is_one_point(report: Report) -> None:
    drawing = trade_off(report, "cpu", QUALITY, SIZE)
    assert drawing is not None
    labels = {item.text for item in ElementTree.fromstring(drawing).iter("text")}
    assert {"quantize = final", "baseline", "distill", "prune"} <= labels


def test_one_model_makes_no_chart() -> None:
    rows = (row("final", "accuracy", 0.8), row("final", "size_bytes", 5))
    assert trade_off(Report(recipe="r", measurements=rows), "cpu", QUALITY, SIZE) is None


def test_percentiles_interpolate() -> None:
    assert [percentile([1.0, 2.0, 4.0], share) for share in (0, 0.25, 0.5, 0.75, 1)] == [1, 1.5, 2, 3, 4]


def test_each_length_range_shows_its_speedup() -> None:
    rows = (
        row("baseline", "latency_ms_length_1_8", 6.0, low=5.0, high=7.0),
        row("final", "latency_ms_length_1_8", 1.5),
        row("baseline", "latency_ms_length_9_16", 8.0),
        row("final", "latency_ms_length_9_16", 1.0),
    )
    drawing = latency_by_length(Report(recipe="r", measurements=rows), "cpu")
    assert drawing is not None
    root = ElementTree.fromstring(drawing)
    assert [item.text for item in root.iter("text") if item.get("class") == "gain"] == ["4.00x", "8.00x"]
    assert len([item for item in root.iter("line") if item.get("class") == "interval"]) == 3, "with its caps"


def test_latency_charts_need_samples() -> None:
    report = Report(recipe="r", measurements=(row("final", "latency_ms", 2.0),))
    assert latency_curves(report, "cpu") is None
    assert latency_by_length(report, "cpu") is None


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("bert.encoder.layer.3.attention.self.query.weight", "bert.encoder.layer.3"),
        ("/bert/encoder/layer.3/attention/MatMul_quantized", "bert.encoder.layer.3"),
        ("bert.embeddings.word_embeddings.weight", "bert.embeddings"),
        ("classifier.weight", "classifier"),
        ("onnx::MatMul_1234_quantized", UNNAMED),
        ("val_12", UNNAMED),
        ("weight", UNNAMED),
    ],
)
def test_module_of_a_tensor_name(name: str, module: str) -> None:
    assert module_of(name) == module


def test_bytes_add_up_by_module_and_type() -> None:
    stored = [("a.weight", 10, "int8"), ("a.bias", 40, "float32"), ("a.other", 5, "int8"), ("b.weight", 1, "int8")]
    layers = [LayerBytes(name=name, bytes=size, dtype=dtype) for name, size, dtype in stored]
    groups = group_by_module(layers)
    assert groups["b"] == {"int8": 1}
    assert list(groups["a"].items()) == [("float32", 40), ("int8", 15)]
