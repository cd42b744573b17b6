"""Tests of trial outcomes, limit margins, refit time and early stopping, against closed forms."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import NormalDist
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import entropy

from compress.plugins.search.early_stopping import early_stopping_reason, measure_divergence, order_by_divergence
from compress.plugins.search.final_evaluation import FinalEvaluation, expected_timing_seconds, timing_budget
from compress.plugins.search.observations import Observations
from compress.plugins.search.outcome import (
    Goal,
    TrialOutcome,
    constraint_margin,
    pack_rows,
    paired_difference,
    unpack_rows,
)
from compress.recipe.recipe import Limit, Search
from compress.results.report import BASELINE, FINAL, Measurement

bits = st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=70)
numbers = st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=20)


@given(st.one_of(bits, numbers))
@settings(deadline=None)
def test_unpacked_rows_equal_packed_rows(values: list[float]) -> None:
    assert unpack_rows(pack_rows(values)) == tuple(values)


def outcome(final: np.ndarray, baseline: np.ndarray) -> TrialOutcome:
    fields = {"metric": "accuracy", "target": "cpu", "unit": "ratio"}
    rows = [
        Measurement(model=model, value=float(scores.mean()), raw=tuple(scores.tolist()), **fields)
        for model, scores in (("final", final), ("baseline", baseline))
    ]
    return TrialOutcome.from_measurements(rows, ("accuracy",))


def test_margin_to_a_relative_limit_uses_cochran_ratio_variance() -> None:
    rng = np.random.default_rng(0)
    x = (rng.random(800) < 0.86).astype(float)
    y = np.where(rng.random(800) < 0.1, 1 - x, x)
    margin = constraint_margin(Limit(metric="accuracy", at_least=0.97, of="baseline"), outcome(y, x), 0.9)
    ratio = y.mean() / x.mean()
    spread = ((y - ratio * x) ** 2).sum() / (800 * 799)
    half = NormalDist().inv_cdf(0.9) * math.sqrt(spread) / x.mean()
    assert margin.value == pytest.approx(ratio / 0.97 - 1)
    assert margin.low == pytest.approx((ratio - half) / 0.97 - 1)


def test_margin_to_an_upper_limit() -> None:
    rows = [
        Measurement(model=model, metric="size_bytes", target="cpu", value=value, unit="bytes")
        for model, value in (("final", 30.0), ("baseline", 100.0))
    ]
    trial_outcome = TrialOutcome.from_measurements(rows)
    relative = constraint_margin(Limit(metric="size_bytes", at_most=0.4, of="baseline"), trial_outcome, 0.9)
    absolute = constraint_margin(Limit(metric="size_bytes", at_most=25.0), trial_outcome, 0.9)
    assert relative is not None
    assert relative == pytest.approx((0.25, 0.25, 0.25))
    assert absolute.value == pytest.approx(-0.2)
    assert constraint_margin(Limit(metric="f1", at_least=0.9), trial_outcome, 0.9) is None, "it was not measured"


def test_difference_of_recipes_is_paired_by_row() -> None:
    rng = np.random.default_rng(1)
    x = (rng.random(500) < 0.8).astype(float)
    first_scores = np.where(rng.random(500) < 0.05, 1 - x, x)
    other = np.where(rng.random(500) < 0.15, 1 - x, x)
    limit = Limit(metric="accuracy", at_least=0.9, of="baseline")
    gap = paired_difference(limit, outcome(first_scores, x), outcome(other, x), 0.95)
    gaps = (first_scores - other) / (0.9 * x.mean())
    assert gap.value == pytest.approx(gaps.mean())
    half = NormalDist().inv_cdf(0.95) * gaps.std(ddof=1) / math.sqrt(500)
    assert gap.high - gap.low == pytest.approx(2 * half)
    # An upper limit reverses the sign.
    below = Limit(metric="accuracy", at_most=0.9, of="baseline")
    turned = paired_difference(below, outcome(first_scores, x), outcome(other, x), 0.95)
    assert turned.value == pytest.approx(-gap.value)


@pytest.mark.parametrize(
    ("limit", "compares"),
    [
        (Limit(metric="latency_ms", at_most=2.0), False),
        (Limit(metric="latency_ms", at_most=0.5, of="baseline"), True),
        (Limit(metric="speedup", at_least=2.0), True),
        (Limit(metric="accuracy", at_least=0.985, of="baseline"), False),
        (Limit(metric="size_bytes", at_most=0.5, of="baseline"), False),
    ],
)
def test_relative_time_limits_need_baseline_times(limit: Limit, compares: bool) -> None:
    assert Goal(("latency_ms",), (limit,), 0.95).compares_times is compares


def search(budget: str) -> Search:
    return Search.model_validate(
        {"budget": budget, "select": {"rows": 100, "from": "train"}, "choices": {"stages.0.epochs": [1, 2]}}
    )


@pytest.mark.parametrize(("budget", "seconds", "within"), [("60s", 12, 12), ("5m", 60, None), ("1h", 60, None)])
def test_short_search_spends_a_fifth_of_its_budget_on_timing(budget: str, seconds: float, within: float | None) -> None:
    assert expected_timing_seconds(search(budget)) == seconds
    assert timing_budget(search(budget)) == within


def ending(ranked: list[tuple[int, ...]], refit: bool = True, width: int = 1, budget: str = "20m") -> FinalEvaluation:
    """Return the final evaluation of a search with 100 s per training, 10% more per refit and 15 s per evaluation."""
    observations = SimpleNamespace(ranked=lambda: ranked, by_shortfall=lambda: [(0,)])
    return FinalEvaluation(
        space=cast("Any", SimpleNamespace(search=search(budget), origin=(0,))),
        costs=cast("Any", SimpleNamespace(evaluation_seconds=15.0, corrected_total_seconds=lambda point: 100.0)),
        engine=cast("Any", SimpleNamespace(observations=observations, shares=(1 / 3, 1.0))),
        trials=cast("Any", SimpleNamespace(workers=SimpleNamespace(width=width))),
        refit=cast("Any", SimpleNamespace(enabled=refit, more_rows=0.1)),
    )


def test_no_time_is_reserved_for_seeds_without_a_winner() -> None:
    session = 60 + 2 * 15
    assert ending([]).reserved_seconds() == pytest.approx(session + 110)
    assert ending([(1,)]).reserved_seconds() == pytest.approx(session + 3 * 110)
    assert ending([(1,)], refit=False).reserved_seconds() == pytest.approx(session + 2 * 100)
    assert ending([(1,)], budget="5m").reserved_seconds() == pytest.approx(session + 150), "at most half of it"


@pytest.mark.parametrize(
    ("left", "width", "seeds"), [(1000, 1, 2), (90 + 331, 1, 2), (90 + 329, 1, 1), (90 + 219, 1, 0), (-5, 1, 0),
                                 (90 + 166, 2, 2)],
)  # fmt: skip
def test_number_of_seeds_fits_the_remaining_time(left: float, width: int, seeds: int) -> None:
    assert ending([(1,)], width=width).affordable_seeds((1,), True, left) == seeds


GOAL = Goal(("size_bytes",), (Limit(metric="accuracy", at_least=0.9, of="baseline"),), 0.9)
ROWS = 400


def known(quality: list[float], apart: list[float]) -> Observations:
    """Return observations at the first rung of recipes with these accuracies (baseline: 1) and mean divergences."""
    chance, observations = np.random.default_rng(0), Observations(GOAL, 2, (0,))
    base, order = np.ones(ROWS), np.random.default_rng(1)
    hard = chance.gamma(2.0, 0.5, ROWS)
    for index, (right, mean) in enumerate(zip(quality, apart, strict=True)):
        final = base.copy()
        final[order.permutation(ROWS)[: round((1 - right) * ROWS)]] = 0
        far = hard * mean * chance.uniform(0.8, 1.2, ROWS)
        rows = {
            FINAL: {"accuracy": pack_rows(final), "kl_divergence": pack_rows(far)},
            BASELINE: {"accuracy": pack_rows(base)},
        }
        values = {"accuracy": float(final.mean()), "kl_divergence": float(far.mean())}
        observations.add((index,), 0, TrialOutcome(final=values, baseline={"accuracy": 1.0}, rows=rows))
    return observations


@pytest.mark.parametrize(
    ("quality", "apart", "before", "after"),
    [
        pytest.param([0.96, 0.955, 0.95], [0.3, 0.2, 0.1], [0.7, 0.6, 0.5], [0.5, 0.6, 0.7], id="quality-is-alike"),
        pytest.param([0.99, 0.8], [0.3, 0.1], [0.7, 0.2], [0.7, 0.2], id="quality-differs"),
        pytest.param([0.96, 0.95], [0.2, 0.2], [0.7, 0.6], [0.7, 0.6], id="divergences-are-alike"),
    ],
)
def test_recipes_of_similar_quality_are_ordered_by_divergence(
    quality: list[float], apart: list[float], before: list[float], after: list[float]
) -> None:
    going = [((index,), 1) for index in range(len(quality))]
    assert order_by_divergence(known(quality, apart), going, before, lambda _: 0) == after


def test_other_families_and_rungs_are_not_compared() -> None:
    looked, chances = known([0.96, 0.95], [0.3, 0.1]), [0.7, 0.6]
    assert order_by_divergence(looked, [((0,), 1), ((1,), 1)], chances, lambda point: point) == chances
    assert order_by_divergence(looked, [((0,), 1), ((1,), 2)], chances, lambda _: 0) == chances


def test_divergence_of_classes_equals_scipy_entropy() -> None:
    """The Kullback-Leibler divergence is measured by row; a task without classes has none."""
    chance = np.random.default_rng(0)
    logits = {label: chance.normal(size=(5, 3)).astype(np.float32) for label in (BASELINE, FINAL)}

    class Task:
        def probabilities(self, kept: dict[str, np.ndarray]) -> np.ndarray | None:
            values = np.exp(kept["logits"])
            return None if "none" in kept else values / values.sum(axis=1, keepdims=True)

    class Session:
        predictions = {label: type("P", (), {"kept": {"logits": values}}) for label, values in logits.items()}
        runner = type("R", (), {"inputs": type("I", (), {"task": Task()})})
        target = type("T", (), {"name": "cpu"})

    (row,) = measure_divergence(Session())  # type: ignore[arg-type]
    teacher, student = (np.exp(logits[label].astype(float)) for label in (BASELINE, FINAL))
    expected = entropy(teacher.T, student.T)
    assert row.raw == pytest.approx(list(expected), rel=1e-5)
    assert math.isclose(row.value, expected.mean(), rel_tol=1e-5)
    Session.predictions[FINAL].kept["none"] = logits[FINAL]  # type: ignore[attr-defined]
    assert measure_divergence(Session()) == []  # type: ignore[arg-type]


SHARES = (1 / 9, 1 / 3, 1.0)
LIMIT = Limit(metric="accuracy", at_least=0.97, of="baseline")
EARLY_GOAL = Goal(("size_bytes",), (LIMIT,), 0.9)


def recipes(chance: np.random.Generator, rows: int, worse: float = 0.0) -> Iterator[list[TrialOutcome]]:
    """Yield outcomes by rung of recipes that end at exactly 97% of a baseline accuracy of 85%, or ``worse`` below it.

    The accuracy at the last rung is 0.85 (1 - 0.06) + 0.15 x 0.17 = 0.8245 = 0.97 x 0.85, at early rungs some 4% less.
    """
    base = chance.random(rows) < 0.85

    def changed(right: np.ndarray, down: float, up: float) -> np.ndarray:
        drawn = chance.random(rows)
        return np.where(right, drawn >= down, drawn < up).astype(float)

    while True:
        full = changed(base, 0.06 + worse, 0.17)
        after = changed(full > 0, 0.12, 0.1), changed(full > 0, 0.06, 0.06), full
        yield [outcome(scores, base.astype(float)) for scores in after]


def given_up(known: Observations, place: int, rungs: list[TrialOutcome]) -> str:
    """Record a recipe rung by rung and return the reason why it is stopped early, or an empty string."""
    for rung, trial_outcome in enumerate(rungs):
        known.add((place,), rung, trial_outcome)
        if rung < known.full_rung and (why := early_stopping_reason(known, (place,), rung, SHARES, lambda _: 0)):
            return why
    return ""


def test_equal_recipes_are_rarely_stopped_early() -> None:
    """In 1,000 searches of four recipes that all just keep the limit, each has two chances to be stopped wrongly."""
    chance = np.random.default_rng(0)
    wrong = looked = 0
    for _ in range(1000):
        known = Observations(EARLY_GOAL, 2, (0,))
        for number, rungs in zip(range(4), recipes(chance, 100), strict=False):
            wrong += bool(given_up(known, number, rungs))
            looked += number > 0
    share, noise = wrong / looked, 3 * (0.1 * 0.9 / looked) ** 0.5
    assert 0 < share <= 1 - EARLY_GOAL.confidence - noise, "well within, since the error is split over looks"


def test_clearly_worse_recipe_is_stopped_early_with_the_reason() -> None:
    chance = np.random.default_rng(1)
    known = Observations(EARLY_GOAL, 2, (0,))
    for number, rungs in zip(range(3), recipes(chance, 1500), strict=False):
        assert not given_up(known, number, rungs)
    # The same rows and baseline, with 35% of the baseline's right predictions lost.
    base = np.array(known.finished[0,].measurement("baseline", "accuracy").raw)  # type: ignore[union-attr]
    bad = np.where(chance.random(len(base)) < 0.35, 0.0, base)
    why = given_up(known, 9, [outcome(bad, base)] * 3)
    assert why.startswith("accuracy at least 0.97: by 11% of training and 2 trials of its family")


def test_temporary_differences_do_not_stop_a_recipe() -> None:
    """Earlier recipes made up for their early deficits, so that a deficit does not predict the final quality."""
    chance = np.random.default_rng(2)
    known = Observations(EARLY_GOAL, 2, (0,))
    for number, rungs in zip(range(6), recipes(chance, 1500), strict=False):
        base = np.array(rungs[2].measurement("baseline", "accuracy").raw)  # type: ignore[union-attr]
        behind = [np.where(chance.random(len(base)) < 0.06 * number, 0.0, base) for _ in range(2)]
        for rung, trial_outcome in enumerate([*(outcome(scores, base) for scores in behind), rungs[2]]):
            known.add((number,), rung, trial_outcome)
    base = np.array(known.finished[0,].measurement("baseline", "accuracy").raw)  # type: ignore[union-attr]
    early = np.where(chance.random(len(base)) < 0.2, 0.0, base)
    known.add((9,), 0, outcome(early, base))
    assert not early_stopping_reason(known, (9,), 0, SHARES, lambda _: 0)
    assert not early_stopping_reason(known, (9,), 0, SHARES, lambda point: point), "and nothing at all without a family"


@pytest.mark.parametrize("of", [None, "baseline"])
def test_early_stopping_compares_perplexity_by_window(of: str | None) -> None:
    """Perplexity is the exponential of the mean loss per window; four recipes end at the limit, one is far worse."""
    chance = np.random.default_rng(3)
    limit = Limit(metric="perplexity", at_most=1.1 if of else 1.1 * np.exp(3.0), of=of)
    goal = Goal(("size_bytes",), (limit,), 0.9)
    base = 3.0 + chance.normal(0, 0.3, 400)
    base -= base.mean() - 3.0

    def made(logs: np.ndarray) -> TrialOutcome:
        rows = {"final": {"perplexity": pack_rows(logs)}, "baseline": {"perplexity": pack_rows(base)}}
        final, first = (float(np.exp(losses.mean())) for losses in (logs, base))
        return TrialOutcome(final={"perplexity": final}, baseline={"perplexity": first}, rows=rows)

    known = Observations(goal, 2, (0,))
    for number in range(4):
        noise = chance.normal(0, 0.02, 400)
        rungs = [made(base + np.log(1.1) + gap + noise) for gap in (0.2, 0.1, -0.02)]
        assert not given_up(known, number, rungs)
    assert "perplexity at most" in given_up(known, 9, [made(base + np.log(1.1) + 0.6)] * 3)
    assert not given_up(known, 8, [made(base + np.log(1.1) + gap) for gap in (0.2, 0.1, -0.02)])
