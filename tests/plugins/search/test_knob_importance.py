"""What each choice matters, against variances that a closed form gives."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from compress.plugins.search.parameter_importance import analyze_importance
from compress.plugins.search.parameters import SearchParameter

KNOBS = (
    SearchParameter("stages.1.distill.width", (4, 3, 2, 1), 1),
    SearchParameter("stages.2.onnx_int8.bits", (8, 4), 2),
    SearchParameter("stages.2.onnx_int8.kind", ("a", "b"), 2),
)
EVERY = list(itertools.product(range(4), range(2), range(2)))


def test_shares_are_those_of_a_sum_whose_variances_add_up() -> None:
    """f = 3 rank + 2 bit + 0 kind on all of the space: the variance of ranks 0, 1/3, 2/3, 1 is 5/36, of a bit 1/4."""
    points = random.Random(0).sample(EVERY, 14)
    values = np.array([3 * point[0] / 3 + 2 * point[1] for point in points], dtype=float)
    importance = analyze_importance(KNOBS, points, values)
    parts = [9 * 5 / 36, 4 * 1 / 4, 0.0]
    assert importance.shares is not None
    assert [share or 0.0 for share in importance.shares] == pytest.approx(
        [part / sum(parts) for part in parts], abs=0.02
    )
    assert "by 14 recipes" in importance.note


def test_what_choices_do_together_is_no_one_s_alone() -> None:
    """f = 1 where both differ: each alone explains nothing."""
    parameters = KNOBS[1:]
    points = [(0, 0), (0, 1), (1, 0), (1, 1)] * 3
    values = np.array([float(a != b) for a, b in points])
    importance = analyze_importance(parameters, points, values)
    assert importance.shares is not None
    assert max(share or 0.0 for share in importance.shares) < 0.05
    assert "100% is in what choices do together" in importance.note


@pytest.mark.parametrize(
    ("points", "values", "says"),
    [
        (EVERY[:4], [1.0, 2.0, 3.0, 4.0], "too few to say: 4 recipes were trained in full, 6 are needed"),
        (EVERY[:8], [1.0] * 8, "came to the same"),
        (EVERY, list(np.random.default_rng(0).normal(size=16)), "too few to say: of 16 recipes, each foretold"),
    ],
)
def test_nothing_is_said_by_too_little(points: list[tuple[int, ...]], values: list[float], says: str) -> None:
    importance = analyze_importance(KNOBS, points, np.array(values))
    assert importance.shares is None
    assert says in importance.note


def test_a_choice_that_was_tried_with_one_value_has_no_share() -> None:
    points = [point for point in EVERY if point[2] == 0]
    importance = analyze_importance(KNOBS, points, np.array([float(point[0]) for point in points]))
    assert importance.shares is not None
    assert importance.shares[2] is None
    assert importance.shares[0] == pytest.approx(1.0, abs=0.01)
