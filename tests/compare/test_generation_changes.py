"""Perplexity and the times of generation from report to report."""

from __future__ import annotations

import math

import numpy as np
import pytest
from comparisons import report, row, time_row

from compress.compare.reports import compare_reports
from compress.measurement import Measurement
from compress.recipe.policy import GATE_RULES, Policy


def perplexity(losses: list[float]) -> Measurement:
    value = math.exp(np.mean(losses))
    return row("perplexity", value, "", raw=tuple(losses), n=len(losses), low=0.9 * value, high=1.1 * value)


def losses(rise: float = 0.0, noise: float = 0.002) -> list[float]:
    """Windows differ much, but by nearly as much for both models."""
    chance = np.random.default_rng(0)
    windows = chance.normal(3.2, 0.4, 24)
    return list(windows + (rise + chance.normal(0, noise, 24) if rise else 0.0))


@pytest.mark.parametrize(("rise", "verdict"), [(0.05, "worse"), (-0.05, "better"), (0.002, "same")])
def test_windows_are_paired(rise: float, verdict: str) -> None:
    before, after = losses(), losses(rise)
    found = compare_reports(report(perplexity(before)), report(perplexity(after)), Policy())
    (change,) = found.changes
    assert change.verdict == verdict
    assert change.effect == pytest.approx(math.exp(np.mean(after) - np.mean(before)) - 1)
    assert change.low is not None and change.high is not None and change.high - change.low < 0.01
    assert change.method == "paired bootstrap over 24 windows"


def test_bits_are_compared_as_they_are() -> None:
    old, new = (report(row("bits_per_parameter", value, "bits")) for value in (4.46, 4.5))
    (change,) = compare_reports(old, new).changes
    assert (change.verdict, change.method) == ("worse", "figures compared as they are")


def test_times_of_one_session_are_paired_launch_by_launch() -> None:
    base = {"model": "baseline", "target": "cpu"}
    step = "time_per_output_token_ms_context_128"
    ratios = (4.0, 4.1, 3.9, 4.0)
    mine = report(
        time_row(step, 40.0).model_copy(update=base),
        time_row(step, 10.0),
        row("speedup_time_per_output_token_context_128", 4.0, "x", raw=ratios, n=4),
    )
    found = compare_reports(mine, mine, baseline_model="baseline")
    (change,) = (one for one in found.changes if one.metric == step)
    assert change.method == "calls paired side by side, t interval over 4 launches of both"
    assert change.effect == pytest.approx(1 / np.prod(ratios) ** 0.25 - 1)


def test_a_gate_watches_perplexity_and_both_times() -> None:
    policy = Policy()
    for metric, margin in {
        "perplexity": "1%",
        "time_per_output_token_ms_context_128": "5%",
        "time_to_first_token_ms_context_512": "5%",
    }.items():
        rule = policy.rule(metric)
        assert rule is not None and rule.worse_by == margin
    assert policy.rule("tokens_per_second_context_128") is None, "the same figure once more"
    assert len({rule.metric for rule in GATE_RULES}) == len(GATE_RULES)
