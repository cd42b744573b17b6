"""Giving up early: how often it is wrong of recipes that are all as good, and that it sees what is clearly worse."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from compress.plugins.search.early_stopping import early_stopping_reason
from compress.plugins.search.goal import Goal
from compress.plugins.search.observations import Observations
from compress.plugins.search.outcome import TrialOutcome, pack_rows
from compress.recipe.recipe import Limit

SHARES = (1 / 9, 1 / 3, 1.0)
LIMIT = Limit(metric="accuracy", at_least=0.97, of="baseline")
GOAL = Goal(("size_bytes",), (LIMIT,), 0.9)


def outcome(final: np.ndarray, base: np.ndarray) -> TrialOutcome:
    rows = {"final": {"accuracy": pack_rows(final)}, "baseline": {"accuracy": pack_rows(base)}}
    values = ({"accuracy": float(scores.mean())} for scores in (final, base))
    return TrialOutcome(final=next(values), baseline=next(values), rows=rows)


def recipes(chance: np.random.Generator, rows: int, worse: float = 0.0) -> Iterator[list[TrialOutcome]]:
    """Recipes that keep exactly 97% of an accuracy of 85%, or so much less, after each rung: early ones some 4% less.

    In full: 0.85 (1 - 0.06) + 0.15 x 0.17 = 0.8245 = 0.97 x 0.85.
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
    """Train a recipe rung by rung, as far as it is let."""
    for rung, trial_outcome in enumerate(rungs):
        known.add((place,), rung, trial_outcome)
        if rung < known.full_rung and (why := early_stopping_reason(known, (place,), rung, SHARES, lambda _: 0)):
            return why
    return ""


def test_of_equals_no_more_are_given_up_wrongly_than_the_confidence_allows() -> None:
    """1,000 searches of four recipes that all just keep the limit, each looked at twice, by ever more of its family."""
    chance = np.random.default_rng(0)
    wrong = looked = 0
    for _ in range(1000):
        known = Observations(GOAL, 2, (0,))
        for number, rungs in zip(range(4), recipes(chance, 100), strict=False):
            wrong += bool(given_up(known, number, rungs))
            looked += number > 0
    share, noise = wrong / looked, 3 * (0.1 * 0.9 / looked) ** 0.5
    assert 0 < share <= 1 - GOAL.confidence - noise, "well within, since the error is split over looks"


def test_what_is_clearly_worse_is_given_up_and_the_reason_says_by_how_much() -> None:
    chance = np.random.default_rng(1)
    known = Observations(GOAL, 2, (0,))
    for number, rungs in zip(range(3), recipes(chance, 1500), strict=False):
        assert not given_up(known, number, rungs)
    # The same rows and baseline, a fifth of the right answers lost.
    base = np.array(known.finished[0,].measurement("baseline", "accuracy").raw)  # type: ignore[union-attr]
    bad = np.where(chance.random(len(base)) < 0.35, 0.0, base)
    why = given_up(known, 9, [outcome(bad, base)] * 3)
    assert why.startswith("accuracy at least 0.97: by 11% of training and 2 trials of its family")


def test_a_difference_that_does_not_last_gives_nothing_up() -> None:
    """Where early gaps were gone in the end, an early gap says nothing."""
    chance = np.random.default_rng(2)
    known = Observations(GOAL, 2, (0,))
    for number, rungs in zip(range(6), recipes(chance, 1500), strict=False):
        base = np.array(rungs[2].measurement("baseline", "accuracy").raw)  # type: ignore[union-attr]
        behind = [np.where(chance.random(len(base)) < 0.06 * number, 0.0, base) for _ in range(2)]
        for rung, trial_outcome in enumerate([outcome(behind[0], base), outcome(behind[1], base), rungs[2]]):
            known.add((number,), rung, trial_outcome)
    base = np.array(known.finished[0,].measurement("baseline", "accuracy").raw)  # type: ignore[union-attr]
    early = np.where(chance.random(len(base)) < 0.2, 0.0, base)
    known.add((9,), 0, outcome(early, base))
    assert not early_stopping_reason(known, (9,), 0, SHARES, lambda _: 0)
    assert not early_stopping_reason(known, (9,), 0, SHARES, lambda point: point), "and nothing at all without a family"


@pytest.mark.parametrize("of", [None, "baseline"])
def test_perplexity_is_judged_by_its_windows(of: str | None) -> None:
    """Perplexity is e to the mean of windows' logarithms; four kin that end at the limit, and one far behind."""
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
