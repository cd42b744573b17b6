"""Rows behind a trial's outcome_fields, and how far inside a limit it lies, against closed forms."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.plugins.search.goal import Goal
from compress.plugins.search.outcome import (
    TrialOutcome,
    constraint_margin,
    outcome_fields,
    pack_rows,
    paired_difference,
    unpack_rows,
)
from compress.recipe.recipe import Limit
from compress.results.measurement import Measurement

bits = st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=70)
numbers = st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=20)


@given(st.one_of(bits, numbers))
@settings(deadline=None)
def test_rows_come_back_as_they_were(values: list[float]) -> None:
    assert unpack_rows(pack_rows(values)) == tuple(values)


def test_bits_take_an_eighth_of_a_byte_a_row() -> None:
    assert len(pack_rows([1.0, 0.0] * 4000)) < 8000 / 8 * 4 / 3 + 20


def outcome(final: list[float], baseline: list[float], metric: str = "accuracy") -> TrialOutcome:
    rows = [
        Measurement(model=model, metric=metric, target="cpu", value=float(np.mean(raw)), unit="ratio", raw=tuple(raw))
        for model, raw in (("final", final), ("baseline", baseline))
    ]
    return TrialOutcome.model_validate(outcome_fields(rows, (metric,)))


def test_the_room_to_a_limit_of_the_baseline_is_cochran_s_ratio() -> None:
    rng = np.random.default_rng(0)
    x = (rng.random(800) < 0.86).astype(float)
    y = np.where(rng.random(800) < 0.1, 1 - x, x)
    margin = constraint_margin(Limit(metric="accuracy", at_least=0.97, of="baseline"), outcome([*y], [*x]), 0.9)
    ratio = y.mean() / x.mean()
    spread = ((y - ratio * x) ** 2).sum() / (800 * 799)
    half = NormalDist().inv_cdf(0.9) * math.sqrt(spread) / x.mean()
    assert margin is not None
    assert margin.value == pytest.approx(ratio / 0.97 - 1)
    assert margin.low == pytest.approx((ratio - half) / 0.97 - 1)


def test_what_must_be_small_has_room_below_its_bound() -> None:
    rows = [
        Measurement(model=model, metric="size_bytes", target="cpu", value=value, unit="bytes")
        for model, value in (("final", 30.0), ("baseline", 100.0))
    ]
    trial_outcome = TrialOutcome.model_validate(outcome_fields(rows, ()))
    relative = constraint_margin(Limit(metric="size_bytes", at_most=0.4, of="baseline"), trial_outcome, 0.9)
    absolute = constraint_margin(Limit(metric="size_bytes", at_most=25.0), trial_outcome, 0.9)
    assert relative is not None
    assert relative == pytest.approx((0.25, 0.25, 0.25))
    assert absolute is not None
    assert absolute.value == pytest.approx(-0.2)


def test_what_was_not_measured_has_no_room() -> None:
    assert constraint_margin(Limit(metric="f1", at_least=0.9), TrialOutcome(), 0.9) is None


def test_the_difference_of_two_recipes_is_paired_by_row() -> None:
    rng = np.random.default_rng(1)
    x = (rng.random(500) < 0.8).astype(float)
    first_scores = np.where(rng.random(500) < 0.05, 1 - x, x)
    other = np.where(rng.random(500) < 0.15, 1 - x, x)
    limit = Limit(metric="accuracy", at_least=0.9, of="baseline")
    gap = paired_difference(limit, outcome([*first_scores], [*x]), outcome([*other], [*x]), 0.95)
    gaps = (first_scores - other) / (0.9 * x.mean())
    assert gap is not None
    assert gap.value == pytest.approx(gaps.mean())
    half = NormalDist().inv_cdf(0.95) * gaps.std(ddof=1) / math.sqrt(500)
    assert gap.high - gap.low == pytest.approx(2 * half)
    # A limit from above turns it round.
    below = Limit(metric="accuracy", at_most=0.9, of="baseline")
    turned = paired_difference(below, outcome([*first_scores], [*x]), outcome([*other], [*x]), 0.95)
    assert turned is not None
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
def test_the_baseline_is_timed_where_a_limit_compares_times(limit: Limit, compares: bool) -> None:
    assert Goal(("latency_ms",), (limit,), 0.95).compares_times is compares
