"""16-bit sums of pairs: against loops over Python's own integers."""

from __future__ import annotations

import numpy as np
import pytest

from compress.numerics.saturation import cut_pairs, pairs_at_risk, pairwise_saturating, without_saturation


def by_hand(activations: np.ndarray, weights: np.ndarray) -> tuple[list[list[int]], int]:
    cut, rows = 0, []
    for row in activations.tolist():
        out = []
        for column in weights.T.tolist():
            total = 0
            for index in range(0, len(row), 2):
                pair = sum(a * w for a, w in zip(row[index : index + 2], column[index : index + 2], strict=True))
                remaining = max(-32768, min(32767, pair))
                cut += remaining != pair
                total += remaining
            out.append(total)
        rows.append(out)
    return rows, cut


def test_products_saturate_as_the_instruction_does():
    generator = np.random.default_rng(0)
    for inner in (1, 2, 7, 12):
        activations = generator.integers(0, 256, (5, inner), dtype=np.uint8)
        weights = generator.integers(-128, 128, (inner, 6)).astype(np.int8)
        expected, cut = by_hand(activations, weights)
        actual, counted = pairwise_saturating(activations, weights)
        assert actual.tolist() == expected and counted == cut
    assert cut > 0 and (actual != activations.astype(int) @ weights.astype(int)).any()


def test_seven_bits_are_safe_and_eight_are_not():
    full, reduced = np.full((4, 3), 127, np.int8), np.full((4, 3), 64, np.int8)
    most = np.full((2, 4), 255, np.uint8)
    assert pairs_at_risk(full) == 1.0 and pairs_at_risk(reduced) == 0.0
    assert pairwise_saturating(most, reduced)[1] == 0
    actual, cut = pairwise_saturating(most, full)
    assert (actual == 2 * 32767).all() and cut == 12
    # Only pairs of one sign add up: +127 beside -127 cancels.
    mixed = np.array([[127], [-127], [127], [127]], np.int8)
    assert pairs_at_risk(mixed) == 0.5


def full_range(weights: np.ndarray) -> np.ndarray:
    return (np.abs(weights).max(axis=0) / 127).astype(np.float32)


@pytest.mark.parametrize("inner", [1, 2, 33, 384])
def test_no_activations_make_narrowed_weights_saturate(inner: int):
    generator = np.random.default_rng(inner)
    weights = generator.normal(size=(inner, 24)).astype(np.float32)
    integers, scales = without_saturation(weights, full_range(weights))
    # The worst that can come in: 255 wherever a column is positive, or wherever it is negative.
    worst = np.concatenate([255 * (integers.T > 0), 255 * (integers.T < 0)]).astype(np.uint8)
    actual, cut = pairwise_saturating(worst, integers)
    assert cut == 0 and pairs_at_risk(integers) == 0
    np.testing.assert_array_equal(actual, worst.astype(int) @ integers.astype(int))
    assert integers.min() >= -127 and (scales >= full_range(weights)).all()


def test_narrowed_weights_lose_less_than_seven_bits_do_and_safe_ones_nothing():
    weights = np.random.default_rng(0).normal(size=(384, 256)).astype(np.float32)
    weights[:, 0], weights[0, 0] = weights[:, 0] / 100, weights[0, 0]  # one outlier, and nothing beside it
    scales, coarse = full_range(weights), (np.abs(weights).max(axis=0) / 64).astype(np.float32)
    eight, seven = (weights / scales).round(), (weights / coarse).round()
    integers, flat = without_saturation(weights, scales)
    assert pairs_at_risk(eight.astype(np.int8)) > 0.01
    lost = [np.square(weights - item).sum() for item in (eight * scales, integers * flat, seven * coarse)]
    assert lost[0] < lost[1] < 0.5 * lost[2]
    np.testing.assert_array_equal(integers[:, 0], eight[:, 0])
    assert flat[0] == scales[0]


def test_one_scale_for_all_columns_stays_one():
    weights = np.random.default_rng(0).normal(size=(64, 48)).astype(np.float32)
    weights[:2, 0] = 4.5
    scale = np.array([np.abs(weights).max() / 127], np.float32)
    assert pairs_at_risk((weights / scale).round().astype(np.int8)) > 0
    integers, flat = without_saturation(weights, scale)
    assert flat.shape == (1,) and pairs_at_risk(integers) == 0


def test_a_pair_is_cut_by_half_of_the_excess_each():
    pairs = np.array([[127, 100, -127, 127, 64], [5, 100, -3, -127, 64]], np.int8)
    assert cut_pairs(pairs).tolist() == [[125, 64, -126, 127, 64], [3, 64, -2, -127, 64]]
    assert cut_pairs(np.full((3, 1), 127, np.int8)).tolist() == [[64], [64], [127]]
