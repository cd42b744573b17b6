from __future__ import annotations

import io
import json
import re

import profiles
import pytest
from rich.console import Console

from compress.report.profile_formatting import (
    count_text,
    giga_text,
    method_notes,
    share_text,
    time_text,
    verdict_text,
    working_set_text,
)
from compress.report.profile_views import artifact_name, console_profile, profile_page, roof_lines, roofline_chart
from compress.utils.responsive_table import bar


@pytest.mark.parametrize(
    ("share", "drawn"),
    [(0, "     "), (1, "█████"), (0.5, "██▌  "), (0.1, "▌    "), (0.2, "█    "), (7, "█████"), (-1, "     ")],
)
def test_bars_in_eighths(share: float, drawn: str) -> None:
    assert bar(share, 5) == drawn


def test_words() -> None:
    assert (time_text(1.25), time_text(0.0834)) == ("1.25 ms", "83.4 µs")
    assert (share_text(None), share_text(0.0742)) == ("\u2013", "7.4%")
    assert (count_text(81.9e6), count_text(2.5e9), count_text(0)) == ("81.9 M", "2.50 G", "0")
    assert (giga_text(165.4e9), giga_text(7.23e9)) == ("165", "7.2")


@pytest.mark.parametrize(
    ("changes", "what", "called"),
    [
        (
            {"phase": "token", "context": 128},
            "a token after 128",
            "16 tokens, one after the other, behind a prompt of 128",
        ),
        ({"phase": "prompt", "context": 128}, "a prompt of 128 tokens", "16 prompts of 128 tokens"),
        ({}, "batches of 1", "16 batches of 1 of 9\u201350 tokens"),
    ],
)
def test_every_view_says_what_a_call_is(changes: dict[str, object], what: str, called: str) -> None:
    profile = profiles.profile(**changes)
    page, console = profile_page(profile), Console(file=io.StringIO(), width=120)
    assert f"2 threads, {what}, a processor" in page
    assert f"{called}, 7 passes each" in page and f"{called}, 7 passes each" in "\n".join(method_notes(profile))
    with console.capture() as capture:
        console.print(console_profile(profile))
    assert (f"on cpu, {what}" in capture.get()) is bool(changes)


def test_which_bandwidth_applies() -> None:
    assert "which the last cache of 33.6 MB holds" in working_set_text(profiles.limits())
    assert "more than the last cache" in working_set_text(profiles.limits(working_set_bytes=90_000_000))
    assert "cache" not in working_set_text(profiles.limits(last_level_cache_bytes=None))


def test_what_binds_is_said() -> None:
    """The whole needs 0.86 ms of the 4.375 ms that are counted."""
    assert verdict_text(profiles.profile()).startswith("Arithmetic and memory each")
    whole = profiles.profile().whole
    fast = whole.model_copy(update={"time_ms": 2.0, "uncounted_ms": 0.0})
    assert verdict_text(profiles.profile(whole=fast)).startswith("Arithmetic binds")
    moved = fast.model_copy(update={"memory_bound_ms": 1.5})
    assert verdict_text(profiles.profile(whole=moved)).startswith("Memory binds")
    assert verdict_text(profiles.profile(whole=fast.model_copy(update={"uncounted_ms": 2.0}))).startswith(
        "The costs of"
    )


def test_notes_name_what_is_not_counted_and_what_beats_the_limit() -> None:
    notes = "\n".join(method_notes(profiles.profile()))
    assert "Einsum (12.5% of the time)" in notes
    assert "6.00 ms, +20%" in notes and "4.10 ms of it operators are at work" in notes
    assert "beat the limit" not in notes
    quick = profiles.profile(rows=(profiles.row("too_quick", "MatMul", time_ms=0.1),))
    assert "1 operators are faster than the limit" in "\n".join(method_notes(quick))


def test_the_roofs_meet_at_the_ridges() -> None:
    """40 GB/s reach 100 GFLOP/s at 2.5 operations a byte and 400 GOP/s at 10; 10 GB/s reach 400 at 40."""
    lines = {line.kind: line for line in roof_lines(profiles.limits(), 0.1, 200, 1e9)}
    assert lines["fp32"].start == (2.5, 100e9)
    assert lines["int8"].start == (10, 400e9)
    assert lines["int8"].end == (200, 400e9)
    assert lines["working"].end == (10, 400e9)
    assert lines["memory"].end == (40, 400e9)
    assert lines["working"].start == (0.1, 4e9)
    assert lines["memory"].start == (0.1, 1e9)


def test_operators_are_drawn_where_they_belong() -> None:
    """An operator on the ridge at full rate is drawn at the corner of the roof."""
    corner = profiles.row("corner", "MatMul", time_ms=0.2, weight_bytes=8e6, compute_bound_ms=0.2)
    chart = roofline_chart(profiles.profile(rows=(corner, profiles.row("other", "MatMul"))))
    assert chart is not None
    circle = re.search(r'<circle cx="([\d.]+)" cy="([\d.]+)"[^>]*></circle><title>MatMul \(corner\)', chart)
    roof = re.search(r'<line x1="([\d.]+)" y1="([\d.]+)"[^>]*class="roof fp32"', chart)
    assert circle is not None and roof is not None
    assert [float(value) for value in circle.groups()] == pytest.approx([float(v) for v in roof.groups()], abs=0.02)
    assert chart.count("<circle") == 2
    assert "whole model" in chart


def test_without_arithmetic_there_is_no_chart() -> None:
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


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("artifacts/runs/tiny/latest/model", "tiny/latest"),
        ("/somewhere/exported", "exported"),
        ("model", "model"),
        ("/", "artifact"),
    ],
)
def test_the_name_of_the_artifact(path: str, name: str) -> None:
    assert artifact_name(profiles.profile(artifact=path)) == name
