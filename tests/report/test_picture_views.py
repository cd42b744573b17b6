"""Tests of the views of an image generator's run: grid of images, drift curves and cost."""

from __future__ import annotations

import re

import pytest
from parsed_pages import parse_page
from picture_reports import MODELS, PROMPTS, TIMES, picture_report

from compress.report import generated_outputs
from compress.report.charts import quality_metrics, trade_off
from compress.report.pages import html_page, markdown_report
from compress.results.metrics import describe_metric
from compress.results.report import Report


@pytest.fixture(scope="module")
def report() -> Report:
    return picture_report()


def test_page_has_every_image_and_its_difference(report: Report) -> None:
    page = html_page(report)
    images = [(attributes["src"], attributes["alt"]) for tag, attributes in parse_page(page).tags if tag == "img"]
    assert len(images) == 3 * (1 + 3 * 2)
    sources = {f"data:image/png;base64,{record.png}" for record in report.pictures}
    assert {source for source, caption in images if caption != "less the baseline's"} == sources
    assert [images[row * 7][1] for row in range(3)] == [f"baseline: {prompt}" for prompt in PROMPTS]
    assert "quantize = final" in page and "10.0 levels" in page
    assert "<b>boots</b>" not in page


def test_drift_table_names_the_timestep_of_divergence(report: Report) -> None:
    assert generated_outputs.drift_cells(report, "cpu") == [
        ("faster", "25", "4.0%", "nowhere"),
        ("distill", "4", "24.0%", "timestep 499"),
        ("quantize = final", "4", "40.0%", "timestep 499"),
    ]
    assert "| distill | 4 | 24.0% | timestep 499 |" in markdown_report(report)


def test_drift_curve_runs_from_noise_to_image(report: Report) -> None:
    chart = generated_outputs.drift_curves(report, "cpu")
    assert chart is not None
    lines = re.findall(r'<polyline points="([^"]+)" class="curve"', chart)
    assert len(lines) == len(MODELS) - 2  # the baseline has no drift, and the last two models are one
    for points in lines:
        across = [float(point.split(",")[0]) for point in points.split()]
        assert across == sorted(across) and len(across) == len(TIMES)
    assert "distill, timestep 249\n18.0% (quartiles 14.4% to 21.6%)" in chart
    assert generated_outputs.drift_curves(report, "gpu") is None


def test_frechet_distance_is_plotted_against_latency_with_steps(report: Report) -> None:
    names = [metric.name for metric in quality_metrics(report, "cpu")]
    assert names == ["prompt_accuracy", "frechet_distance"]
    chart = trade_off(report, "cpu", describe_metric("frechet_distance"), describe_metric("latency_ms"))
    assert chart is not None
    for label in ("baseline, 50 steps", "faster, 25 steps", "distill, 4 steps", "quantize = final, 4 steps"):
        assert f">{label}<" in chart
    assert html_page(report).count("Fr\u00e9chet distance against latency") == 2  # heading and label
