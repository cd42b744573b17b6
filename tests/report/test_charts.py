from __future__ import annotations

from itertools import combinations
from xml.etree import ElementTree

import pytest

from compress.report.charts import TradeOffPoint, latency_by_length, latency_curves, pareto, percentile, trade_off
from compress.report.layers import UNNAMED, group_by_module, module_of
from compress.report.plot import Box, place_labels
from compress.results.measurement import Measurement
from compress.results.metrics import describe_metric
from compress.results.report import LayerBytes, Report

QUALITY, SIZE = describe_metric("accuracy", "ratio"), describe_metric("size_bytes", "bytes")


def row(model: str, metric: str, value: float, **more: object) -> Measurement:
    fields = {"model": model, "metric": metric, "target": "cpu", "value": value, "unit": "", **more}
    return Measurement.model_validate(fields)


def point(name: str, cost: float, quality: float) -> TradeOffPoint:
    return TradeOffPoint((name,), row(name, "size_bytes", cost), row(name, "accuracy", quality))


def test_the_front_holds_what_no_other_beats() -> None:
    points = [
        point("a", 1, 0.5),
        point("b", 2, 0.4),
        point("c", 3, 0.7),
        point("d", 3, 0.6),
        point("e", 9, 0.7),
    ]
    assert [p.models[0] for p in pareto(points, higher=True)] == ["a", "c"]
    assert [p.models[0] for p in pareto(points, higher=False)] == ["a", "b"]


def test_marks_lie_where_the_scales_put_them() -> None:
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


def test_labels_cover_neither_points_nor_one_another() -> None:
    points = [(100.0 + 7 * i, 100.0 + 3 * (i % 3)) for i in range(6)]
    bounds = Box(0, 0, 400, 300)
    placed = place_labels(points, ["label " + "x" * i for i in range(6)], bounds)
    boxes = [spot.box for spot in placed]
    assert not any(a.overlap(b) for a, b in combinations(boxes, 2))
    assert not any(box.left < x < box.right and box.top < y < box.bottom for box in boxes for x, y in points)
    assert not any(box.outside(bounds) for box in boxes)


def test_percentiles_interpolate() -> None:
    assert [percentile([1.0, 2.0, 4.0], share) for share in (0, 0.25, 0.5, 0.75, 1)] == [1, 1.5, 2, 3, 4]


def test_the_median_of_the_samples_is_written(report: Report) -> None:
    drawing = latency_curves(report, "cpu")
    assert drawing is not None
    words = [item.text for item in ElementTree.fromstring(drawing).iter("text")]
    assert "2.71 ms" in words
    assert "0.231 ms" in words


def test_each_length_range_shows_its_gain() -> None:
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


def test_no_samples_no_distribution() -> None:
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
def test_tensors_belong_to_modules(name: str, module: str) -> None:
    assert module_of(name) == module


def test_bytes_add_up_by_module_and_type() -> None:
    stored = [
        ("a.weight", 10, "int8"),
        ("a.bias", 40, "float32"),
        ("a.other", 5, "int8"),
        ("b.weight", 1, "int8"),
    ]
    layers = [LayerBytes(name=name, bytes=size, dtype=dtype) for name, size, dtype in stored]
    groups = group_by_module(layers)
    assert groups["b"] == {"int8": 1}
    assert list(groups["a"].items()) == [("float32", 40), ("int8", 15)]
