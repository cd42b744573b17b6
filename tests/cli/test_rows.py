"""Measurements in a terminal: nothing cut off where there is little room."""

from __future__ import annotations

from generation_reports import generation_report
from narrow import broken_words, shown

from compress.cli.output import render_generation, render_rows
from compress.results.report import Measurement

ROWS = (
    Measurement(model="final", metric="accuracy[label=good]", target="cpu", value=0.75, unit="ratio", low=0.7,
                high=0.8),
    Measurement(model="trim_vocabulary", metric="time_per_output_token_ms_context_2048", target="browser", value=1.5,
                unit="ms", low=1.25, high=1.75, n=12_000),
)  # fmt: skip


def test_no_word_is_broken_and_every_figure_is_there_at_80_columns() -> None:
    measured = generation_report().measurements
    for table in (render_rows(ROWS), render_rows(measured), render_generation(measured)):
        assert broken_words(table, 80) == []
    assert "70.00\u201380.00%" in shown(render_rows(ROWS), 80)
