"""What a judge sees of drawn pictures, from report to report: paired picture by picture."""

from __future__ import annotations

import numpy as np
import pytest
from comparisons import report, row

from compress.plugins.diffusion.image_statistics import frechet_distance, frechet_interval, frechet_shares
from compress.recipe.policy import Policy
from compress.report.compare.reports import compare_reports
from compress.results.measurement import Measurement

PICTURES = 400


def features(seed: int, shift: float = 0.0) -> np.ndarray:
    """What a judge makes of pictures: much of it is the prompt's and the seed's, whoever draws."""
    shared = np.random.default_rng(0).normal(size=(PICTURES, 4))
    return shared + 0.1 * np.random.default_rng(seed).normal(size=(PICTURES, 4)) + shift


REAL = np.random.default_rng(9).normal(0.5, 1.0, size=(PICTURES, 4))


def distance(generated: np.ndarray) -> Measurement:
    value, low, high = frechet_interval(generated, REAL, 0, 50)
    raw = tuple(frechet_shares(generated, REAL).tolist())
    return row("frechet_distance", value, "", raw=raw, n=len(raw), low=low, high=high)


@pytest.mark.parametrize(("shift", "verdict"), [(-0.1, "worse"), (0.1, "better"), (0.002, "same")])
def test_distances_are_paired_by_what_each_picture_adds(shift: float, verdict: str) -> None:
    baseline_features, candidate_features = features(1), features(2, shift)
    (change,) = compare_reports(
        report(distance(baseline_features)), report(distance(candidate_features)), Policy()
    ).changes
    assert change.verdict == verdict
    assert change.effect == pytest.approx(
        frechet_distance(candidate_features, REAL) / frechet_distance(baseline_features, REAL) - 1
    )
    assert change.method == "paired bootstrap over 400 examples"
    assert change.low is not None and change.high is not None
    # Apart, the two would not be told from each other: each alone is known to a fifth or so.
    baseline_distance = distance(baseline_features)
    assert baseline_distance.low is not None and baseline_distance.high is not None
    assert change.high - change.low < 0.5 * (baseline_distance.high - baseline_distance.low) / baseline_distance.value
