"""16-bit sums of pairs: against loops over Python's own integers."""

from __future__ import annotations

import numpy as np

from compress.numerics.saturation import pairs_at_risk, pairwise_saturating


def by_hand(activations: np.ndarray, weights: np.ndarray) -> tuple[list[list[int]], int]:
    cut, rows = 0, []
    for row in activations.tolist():
        out = []
        for column in weights.T.tolist():
            total = 0
            for place in range(0, len(row), 2):
                pair = sum(a * w for a, w in zip(row[place : place + 2], column[place : place + 2], strict=True))
                kept = max(-32768, min(32767, pair))
                cut += kept != pair
                total += kept
            out.append(total)
        rows.append(out)
    return rows, cut


def test_products_saturate_as_the_instruction_does():
    generator = np.random.default_rng(0)
    for inner in (1, 2, 7, 12):
        activations = generator.integers(0, 256, (5, inner), dtype=np.uint8)
        weights = generator.integers(-128, 128, (inner, 6)).astype(np.int8)
        expected, cut = by_hand(activations, weights)
        found, counted = pairwise_saturating(activations, weights)
        assert found.tolist() == expected and counted == cut
    assert cut > 0 and (found != activations.astype(int) @ weights.astype(int)).any()


def test_seven_bits_are_safe_and_eight_are_not():
    full, reduced = np.full((4, 3), 127, np.int8), np.full((4, 3), 64, np.int8)
    most = np.full((2, 4), 255, np.uint8)
    assert pairs_at_risk(full) == 1.0 and pairs_at_risk(reduced) == 0.0
    assert pairwise_saturating(most, reduced)[1] == 0
    found, cut = pairwise_saturating(most, full)
    assert (found == 2 * 32767).all() and cut == 12
    # Only pairs of one sign add up: +127 beside -127 cancels.
    mixed = np.array([[127], [-127], [127], [127]], np.int8)
    assert pairs_at_risk(mixed) == 0.5
