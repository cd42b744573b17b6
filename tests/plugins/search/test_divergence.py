"""Divergence from the baseline puts recipes in order that quality cannot tell apart, and no others."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import entropy

from compress.plugins.search.goal import Goal
from compress.plugins.search.observations import Observations
from compress.plugins.search.outcome import TrialOutcome, pack_rows
from compress.plugins.search.proxy_metric import measure_divergence, order_by_divergence
from compress.recipe.recipe import Limit
from compress.results.report import BASELINE, FINAL

GOAL = Goal(("size_bytes",), (Limit(metric="accuracy", at_least=0.9, of="baseline"),), 0.9)
ROWS = 400


def known(quality: list[float], apart: list[float]) -> Observations:
    """Recipes looked at after the first rung: right answers as a share of the baseline's, and mean divergences."""
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


def going(count: int) -> list[tuple[tuple[int, ...], int]]:
    return [((index,), 1) for index in range(count)]


def test_what_quality_cannot_tell_apart_is_put_in_order_by_divergence() -> None:
    looked = known([0.96, 0.955, 0.95], [0.3, 0.2, 0.1])
    assert order_by_divergence(looked, going(3), [0.7, 0.6, 0.5], lambda _: 0) == [0.5, 0.6, 0.7]


def test_what_quality_tells_apart_stays_as_it_is() -> None:
    looked = known([0.99, 0.8], [0.3, 0.1])
    assert order_by_divergence(looked, going(2), [0.7, 0.2], lambda _: 0) == [0.7, 0.2]


def test_divergences_that_are_alike_change_nothing_nor_do_other_families_and_rungs() -> None:
    looked = known([0.96, 0.95], [0.2, 0.2])
    assert order_by_divergence(looked, going(2), [0.7, 0.6], lambda _: 0) == [0.7, 0.6]
    looked = known([0.96, 0.95], [0.3, 0.1])
    assert order_by_divergence(looked, going(2), [0.7, 0.6], lambda point: point) == [0.7, 0.6]
    assert order_by_divergence(looked, [((0,), 1), ((1,), 2)], [0.7, 0.6], lambda _: 0) == [0.7, 0.6]


def test_of_classes_it_is_the_entropy_between_both_models_answers() -> None:
    """As scipy has it; rows of 0 probability count as nearly so, and tasks without classes have none."""
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
