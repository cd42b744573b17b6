"""Tests of slices in the report: storage of their rows, and their views."""

from __future__ import annotations

import base64
import re

import pytest
from hypothesis import given, strategies
from pydantic import ValidationError

from compress.numerics.differences import difference_of_shares
from compress.report.charts import reliability_diagram, slice_plot
from compress.report.slices import slice_results
from compress.results.metrics import describe_metric, main_metrics, metric_on_slice, other_metrics, slice_of
from compress.results.report import Report, SliceRecord


def test_slice_bits_are_stored_most_significant_first() -> None:
    record = SliceRecord.of([True, False, False, False, False, False, False, True, False, True], "ten rows")
    assert base64.b64decode(record.bits) == bytes([0b10000001, 0b01000000])
    assert record.rows == 3
    assert record.indices() == (0, 7, 9)


@given(strategies.lists(strategies.booleans(), min_size=1, max_size=70).filter(any))
def test_slice_rows_round_trip(members: list[bool]) -> None:
    record = SliceRecord.of(members)
    assert record.indices() == tuple(index for index, member in enumerate(members) if member)


@pytest.mark.parametrize(("bits", "rows"), [("?", 1), ("gA==", 2), ("AA==", 0), ("", 1)])
def test_invalid_slice_bits_are_refused(bits: str, rows: int) -> None:
    with pytest.raises(ValidationError):
        SliceRecord(bits=bits, rows=rows)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("accuracy[label=good]", ("accuracy", "label=good")),
        ("accuracy[source=a[b]]", ("accuracy", "source=a[b]")),
        ("recall_at_10[characters>=32]", ("recall_at_10", "characters>=32")),
        ("accuracy", None),
        ("accuracy[]", None),
        ("latency_ms_length_4_16", None),
    ],
)
def test_slice_names_are_parsed_and_formatted(name: str, parts: tuple[str, str] | None) -> None:
    assert slice_of(name) == parts
    if parts:
        assert metric_on_slice(*parts) == name


def test_slice_metrics_are_not_shown_as_columns(report: Report) -> None:
    units = report.metrics("cpu")
    assert "accuracy[label=positive]" in units
    shown = [metric.name for metric in (*main_metrics(units), *other_metrics(units))]
    assert not any("[" in name for name in shown)
    metric = describe_metric("accuracy[label=positive]", "ratio")
    assert (metric.title, metric.better, metric.quality, metric.style) == (
        "Accuracy, label=positive",
        "higher",
        False,
        "percent",
    )


def test_figures_by_slice(report: Report) -> None:
    results = slice_results(report, "cpu")
    assert results is not None
    figures = {slice_result.name: slice_result for slice_result in results[1]}
    assert list(figures) == ["all rows", *report.slices]
    # In the fixture the first 1746 and 1737 rows are right; the predicate holds rows 1700 to 1759.
    special = figures["a predicate with a name that is long"]
    assert {model: row.value for model, row in special.measured.items()} == {"baseline": 46 / 60, "final": 37 / 60}
    assert special.change == pytest.approx(difference_of_shares(9, 0, 60, 0.95))
    assert figures["all rows"].change == pytest.approx(difference_of_shares(9, 0, 2000, 0.95))
    assert figures["characters=Q1"].change == pytest.approx(difference_of_shares(0, 0, 500, 0.95))


def test_unpaired_outcomes_have_no_change_by_slice(report: Report) -> None:
    rows = tuple(
        row.model_copy(update={"raw": None}) if (row.model, row.metric) == ("baseline", "accuracy") else row
        for row in report.measurements
    )
    results = slice_results(report.model_copy(update={"measurements": rows}), "cpu")
    assert results is not None
    assert {slice_result.change for slice_result in results[1]} == {None}


def test_slice_plot_has_both_models_in_every_line(report: Report) -> None:
    drawing = slice_plot(report, "cpu")
    assert drawing is not None
    lines = len(report.slices) + 1
    assert len(re.findall('class="point final"', drawing)) == lines
    assert len(re.findall('class="point baseline"', drawing)) == lines
    assert "a predicate with a name that is long" in drawing  # in the tooltip; the label is cut
    assert ">a predicate with \u2026<" in drawing


def test_the_reliability_diagram_has_every_bin(report: Report) -> None:
    drawing = reliability_diagram(report, "cpu")
    assert drawing is not None
    assert drawing.count("of 900 answers") == 8
    assert "probability 72.0%, right 70.0%" in drawing
    assert reliability_diagram(report, "gpu") is None
