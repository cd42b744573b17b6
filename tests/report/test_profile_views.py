"""Tests of the views of a profile: verdict, roofline chart and tables."""

from __future__ import annotations

import json
import re

import profiles
import pytest

from compress.report.profile_formatting import (
    verdict_text,
)
from compress.report.profile_views import profile_page, roof_lines, roofline_chart


def test_verdict_names_the_bottleneck() -> None:
    """The model's bound is 0.86 ms of the 4.375 ms that are counted."""
    assert verdict_text(profiles.profile()).startswith("Arithmetic and memory each")
    whole = profiles.profile().whole
    fast = whole.model_copy(update={"time_ms": 2.0, "uncounted_ms": 0.0})
    assert verdict_text(profiles.profile(whole=fast)).startswith("Compute-bound")
    moved = fast.model_copy(update={"memory_bound_ms": 1.5})
    assert verdict_text(profiles.profile(whole=moved)).startswith("Memory-bound")
    assert verdict_text(profiles.profile(whole=fast.model_copy(update={"uncounted_ms": 2.0}))).startswith(
        "The costs of"
    )


def test_roofs_meet_at_their_ridge_points() -> None:
    """40 GB/s reach 100 GFLOP/s at 2.5 operations a byte and 400 GOP/s at 10; 10 GB/s reach 400 at 40."""
    lines = {line.kind: line for line in roof_lines(profiles.limits(), 0.1, 200, 1e9)}
    assert lines["fp32"].start == (2.5, 100e9)
    assert lines["int8"].start == (10, 400e9)
    assert lines["int8"].end == (200, 400e9)
    assert lines["working"].end == (10, 400e9)
    assert lines["memory"].end == (40, 400e9)
    assert lines["working"].start == (0.1, 4e9)
    assert lines["memory"].start == (0.1, 1e9)


def test_operators_are_plotted_at_their_intensity_and_rate() -> None:
    """An operator on the ridge at full rate is plotted at the corner of the roof."""
    corner = profiles.row("corner", "MatMul", time_ms=0.2, weight_bytes=8e6, compute_bound_ms=0.2)
    chart = roofline_chart(profiles.profile(rows=(corner, profiles.row("other", "MatMul"))))
    assert chart is not None
    circle = re.search(r'<circle cx="([\d.]+)" cy="([\d.]+)"[^>]*></circle><title>MatMul \(corner\)', chart)
    roof = re.search(r'<line x1="([\d.]+)" y1="([\d.]+)"[^>]*class="roof fp32"', chart)
    assert circle is not None and roof is not None
    assert [float(value) for value in circle.groups()] == pytest.approx([float(v) for v in roof.groups()], abs=0.02)
    assert chart.count("<circle") == 2
    assert "whole model" in chart


def test_profile_without_arithmetic_has_no_chart() -> None:
    moves = profiles.row("a", "Gather", fp32_operations=0.0)
    assert roofline_chart(profiles.profile(rows=(moves,))) is None
    assert "<h2>How close" not in profile_page(profiles.profile(rows=(moves,)))


def test_the_page_has_every_table_and_its_own_json() -> None:
    profile = profiles.profile()
    page = profile_page(profile)
    assert json.loads(re.search(r'id="report-json">(.*?)</script>', page, re.S)[1]) == profile.to_json()  # type: ignore[index]
    for words in ("By operator type", "By layer", "All 4 operators", "19.7%", "100 GFLOP/s", "noise: quiet"):
        assert words in page
    assert page.count('scope="row">') == 4 + 3 + 4
    assert "default-src 'none'" in page


def test_noisy_machine_has_a_banner() -> None:
    banner = "The machine was too noisy"
    assert banner not in profile_page(profiles.profile())
    noise = {"noise": {"verdict": "unusable", "reasons": ["other processes took 81% of the processor"]}}
    page = profile_page(profiles.profile(environment=noise))
    assert banner in page and "other processes took 81% of the processor" in page.partition(banner)[2]
