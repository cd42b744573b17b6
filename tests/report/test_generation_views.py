"""Tests of the views of a language model's run: headlines, limits and generated texts."""

from __future__ import annotations

import math

import pytest
from generation_reports import LOSSES, TEXTS, generation_report, perplexity
from scipy import stats

from compress.report.charts import cost_metrics
from compress.report.generated_outputs import continuation_pairs, equal_texts
from compress.report.headline import headlines
from compress.report.limits import paired_ratio_interval
from compress.report.pages import html_page, markdown_report
from compress.results.metrics import main_metrics
from compress.results.report import LostToken, parse_report

REPORT = generation_report()


def test_perplexity_ratio_has_the_paired_t_interval() -> None:
    differences = [final - baseline for final, baseline in zip(LOSSES["final"], LOSSES["baseline"], strict=True)]
    middle, error = sum(differences) / 8, stats.sem(differences)
    expected = [math.exp(value) for value in stats.t.interval(0.95, 7, middle, error)]
    assert paired_ratio_interval(perplexity("final"), perplexity("baseline")) == pytest.approx(expected)


@pytest.mark.parametrize(
    "changes", [{"raw": None}, {"raw": LOSSES["baseline"][:5]}, {"raw": tuple(x + 1 for x in LOSSES["baseline"])}]
)
def test_unpaired_perplexities_have_no_interval_of_their_ratio(changes: dict[str, object]) -> None:
    assert paired_ratio_interval(perplexity("final"), perplexity("baseline", **changes)) is None


def test_headlines_show_losses_and_gains() -> None:
    tiles = {tile.label: tile for tile in headlines(REPORT, "cpu")}
    assert set(tiles) == {"Perplexity", "Smaller on disk", "Faster writing", "Faster reading", "Agreement"}
    rise = math.exp((sum(LOSSES["final"]) - sum(LOSSES["baseline"])) / 8) - 1
    assert tiles["Perplexity"].figure == f"{rise:+.1%}" == "+9.8%"
    # The limit lies within the interval.
    assert (tiles["Perplexity"].status, tiles["Perplexity"].limit) == ("unknown", "<= 112% of baseline")
    assert "95% interval +6.9% to +12.8%" in tiles["Perplexity"].detail
    assert tiles["Smaller on disk"].detail == "538 MB \u2192 78.0 MB; 4.46 bits a parameter"
    assert tiles["Faster writing"].figure == "5.00x"
    assert (tiles["Faster writing"].status, tiles["Faster writing"].limit) == ("missed", ">= 5.5x")
    assert "18.2 tokens/s \u2192 90.9 tokens/s, prompt of 128" in tiles["Faster writing"].detail
    assert "KL divergence 0.104 nats" in tiles["Agreement"].detail


def test_columns_are_those_of_the_shortest_prompt() -> None:
    names = [metric.name for metric in main_metrics(REPORT.metrics("cpu"))]
    assert names[:3] == ["perplexity", "next_token_accuracy", "agreement"]
    assert "tokens_per_second_context_128" in names and "bits_per_parameter" in names
    assert not [name for name in names if name.endswith("512")]
    assert [metric.name for metric in cost_metrics(REPORT, "cpu")] == [
        "size_bytes", "time_per_output_token_ms_context_128",
    ]  # fmt: skip


def test_texts_are_paired_and_split_at_their_first_difference() -> None:
    first, second, third = continuation_pairs(REPORT, "cpu")
    assert first.baseline.text[: first.same] == " the world's oceans, "
    assert second.same == len(TEXTS["final"][1])
    assert third.same == 1
    assert equal_texts([first, second, third]) == "1 of 3 continuations are the same to the end"
    assert [pair.parting for pair in (first, second, third)] == [
        "They diverge at token 4: \u201c with\u201d 60% over \u201c else\u201d 15% before, "
        "\u201c and\u201d 40% over \u201c else\u201d 10% now",
        "",
        "They diverge at token 1: \u201c his\u201d 60% over \u201c else\u201d 15% before, "
        "\u201c the\u201d 40% over \u201c else\u201d 10% now",
    ]
    markup = html_page(REPORT)
    assert "They diverge at token 4: \u201c with\u201d 60%" in markup
    assert '<span class="apart final">and covers about' in markup
    assert "&lt;b&gt;Algae&lt;/b&gt; are a diverse group of\n\norganisms" in markup
    assert markup.count("repeats itself: 71%") == 1
    assert "What they write" not in html_page(REPORT.model_copy(update={"continuations": ()}))


def test_lost_tokens_are_shown_after_their_text() -> None:
    lost = LostToken(target="cpu", before="Paris is the\ncapital of", token=" France", baseline=0.912, final=0.031)
    report = REPORT.model_copy(update={"lost_tokens": (lost,)})
    assert parse_report(report.model_dump_json(), "").lost_tokens == (lost,)
    page, text = html_page(report), markdown_report(report)
    assert 'capital of<span class="apart final"> France</span>' in page and "91.2% \u2192 3.1%" in page
    assert "| Paris is the capital of | France | 91.2% | 3.1% |" in text
    assert "What was lost" not in html_page(REPORT)
