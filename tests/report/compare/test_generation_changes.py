"""Tests of changes in perplexity, generated text and generated images."""

from __future__ import annotations

import math

import numpy as np
import pytest
from comparisons import report, row, time_row
from generation_reports import PROMPTS, TEXTS, generation_report

from compress.recipe.policy import Policy
from compress.report.compare.pages import html_comparison, markdown_comparison
from compress.report.compare.reports import compare_reports
from compress.report.pages import html_page
from compress.results.report import AnswerRecord, Measurement


def perplexity(losses: list[float]) -> Measurement:
    value = math.exp(np.mean(losses))
    return row("perplexity", value, "", raw=tuple(losses), n=len(losses), low=0.9 * value, high=1.1 * value)


def losses(rise: float = 0.0, noise: float = 0.002) -> list[float]:
    """Return losses of 24 windows that vary far more between windows than between the two models."""
    chance = np.random.default_rng(0)
    windows = chance.normal(3.2, 0.4, 24)
    return list(windows + (rise + chance.normal(0, noise, 24) if rise else 0.0))


@pytest.mark.parametrize(("rise", "verdict"), [(0.05, "worse"), (-0.05, "better"), (0.002, "same")])
def test_perplexities_are_paired_by_window(rise: float, verdict: str) -> None:
    baseline_losses, candidate_losses = losses(), losses(rise)
    comparison = compare_reports(report(perplexity(baseline_losses)), report(perplexity(candidate_losses)), Policy())
    (change,) = comparison.changes
    assert change.verdict == verdict
    assert change.effect == pytest.approx(math.exp(np.mean(candidate_losses) - np.mean(baseline_losses)) - 1)
    assert change.low is not None and change.high is not None and change.high - change.low < 0.01
    assert change.method == "paired bootstrap over 24 windows"


def test_times_of_one_session_are_paired_by_launch() -> None:
    base = {"model": "baseline", "target": "cpu"}
    step = "time_per_output_token_ms_context_128"
    ratios = (4.0, 4.1, 3.9, 4.0)
    mine = report(
        time_row(step, 40.0).model_copy(update=base),
        time_row(step, 10.0),
        row("speedup_time_per_output_token_context_128", 4.0, "x", raw=ratios, n=4),
    )
    comparison = compare_reports(mine, mine, baseline_model="baseline")
    (change,) = (metric_change for metric_change in comparison.changes if metric_change.metric == step)
    assert change.method == "calls paired side by side, t interval over 4 launches of both"
    assert change.effect == pytest.approx(1 / np.prod(ratios) ** 0.25 - 1)


def test_continuations_are_shown_side_by_side() -> None:
    """The reports are one run, or two runs that share some prompts."""
    mine = generation_report()
    comparison = compare_reports(mine, mine, baseline_model="baseline")
    assert [(pair.prompt, pair.baseline, pair.candidate) for pair in comparison.continuations] == list(
        zip(PROMPTS, TEXTS["baseline"], TEXTS["final"], strict=True)
    )
    assert comparison.continuations[0].parting.startswith("They diverge at token 4: ")
    page, text = html_comparison(comparison), markdown_comparison(comparison)
    assert '<span class="apart final">and covers about' in page and "They diverge at token 4" in page
    assert "1 of 3 continuations are the same to the end" in page and "They diverge at token 4" in text
    fewer = mine.model_copy(update={"continuations": mine.continuations[1:]})
    both = compare_reports(fewer, mine)
    assert [pair.baseline == pair.candidate for pair in both.continuations] == [True] * 3
    assert compare_reports(mine, mine.model_copy(update={"continuations": ()})).continuations == ()


def test_instructions_followed_by_one_model_only_are_flips() -> None:
    def answers(model: str, *missed: tuple[str, ...]) -> tuple[AnswerRecord, ...]:
        return tuple(
            AnswerRecord(model=model, target="cpu", prompt=f"do {index}", text=f"{model} {index}", missed=failed_checks)
            for index, failed_checks in enumerate(missed)
        )

    records = answers("baseline", (), ("words 1",), ()) + answers("final", ("json",), (), ())
    mine = generation_report(answers=records)
    flips = compare_reports(mine, mine, baseline_model="baseline").flips
    assert [(flip.row, flip.now, flip.label) for flip in flips] == [
        (0, "wrong", "not json"),
        (1, "right", "not words 1"),
    ]
    assert (flips[0].example, flips[0].baseline_answer, flips[0].candidate_answer) == ("do 0", "baseline 0", "final 0")
    page = html_page(mine).partition("<main")[2].partition("</main>")[0]
    assert "Instructions that one of the two followed" in page and "not json" in page and "do 2" not in page
