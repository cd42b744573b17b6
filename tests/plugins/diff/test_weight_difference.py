"""Tests of the statistics of weight differences, against numpy on whole matrices."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from compress.plugins.diff.diagnose import find_causes
from compress.plugins.diff.weight_difference import (
    Chunk,
    Chunks,
    reordered,
    repeated_within,
    smallest_steps,
    spectrum,
    sums,
)

RANDOM = np.random.default_rng(5)


BEFORE = RANDOM.standard_normal((24, 18)).astype(np.float32)


AFTER = (BEFORE + 0.1 * RANDOM.standard_normal(BEFORE.shape)).astype(np.float32)


def chunks(before: np.ndarray, after: np.ndarray, rows: int = 7) -> Chunks:
    def read() -> Iterator[Chunk]:
        for start in range(0, len(before), rows):
            yield before[start : start + rows], after[start : start + rows]

    return read


def test_chunked_sums_equal_those_of_whole_matrices() -> None:
    original, after = BEFORE.copy(), AFTER.copy()
    after[3], original[5, 2] = 0.0, 0.0
    actual = sums(chunks(original, after))
    apart = after.astype(np.float64) - original
    np.testing.assert_allclose(actual.rows.difference, np.square(apart).sum(axis=1), rtol=1e-5)
    np.testing.assert_allclose(actual.columns.product, (original * after).sum(axis=0), rtol=1e-4)
    assert actual.relative == pytest.approx(np.linalg.norm(apart) / np.linalg.norm(original), rel=1e-5)
    cosine = float((original * after).sum() / np.linalg.norm(original) / np.linalg.norm(after))
    assert actual.cosine == pytest.approx(cosine, rel=1e-5)
    assert actual.zeros == (1, 18) and actual.size == 24 * 18
    assert (actual.low, actual.high) == ((original.min(), after.min()), (original.max(), after.max()))


def test_non_finite_values_are_counted_and_treated_as_zero() -> None:
    after = AFTER.copy()
    after[2, 3], after[9, 1] = np.nan, np.inf
    actual = sums(chunks(BEFORE, after))
    assert actual.not_finite == (0, 2)
    clean = np.where(np.isfinite(after), after, 0)
    assert actual.difference == pytest.approx(float(np.square(clean - BEFORE).sum()), rel=1e-5)


def test_largest_singular_values_equal_numpy() -> None:
    scales = np.geomspace(30, 0.1, 18)
    original = (np.linalg.qr(BEFORE)[0] * scales @ np.linalg.qr(AFTER[:18])[0]).astype(np.float32)
    added = np.outer(RANDOM.standard_normal(24), RANDOM.standard_normal(18))
    added += np.outer(RANDOM.standard_normal(24), RANDOM.standard_normal(18))
    after = (original + added).astype(np.float32)
    actual = spectrum(chunks(original, after), 18, float(np.square(added).sum()))
    np.testing.assert_allclose(actual.before[:4], np.linalg.svd(original, compute_uv=False)[:4], rtol=1e-3)
    np.testing.assert_allclose(actual.after[:4], np.linalg.svd(after, compute_uv=False)[:4], rtol=1e-3)
    np.testing.assert_allclose(actual.difference[:2], np.linalg.svd(added, compute_uv=False)[:2], rtol=1e-3)
    assert actual.rank == 2


@pytest.mark.parametrize(
    ("rows", "cause"),
    [
        (np.ones(24), "the same vector was added to every row, as when two embedding tables are merged"),
        (RANDOM.standard_normal(24), "a change of rank 1 was added, as a merged LoRA adds it"),
    ],
)
def test_vector_added_to_every_row_is_no_adapter(rows: np.ndarray, cause: str) -> None:
    after = (BEFORE + np.outer(rows, RANDOM.standard_normal(18)) + 1e-3 * AFTER).astype(np.float32)
    read = sums(chunks(BEFORE, after))
    head = spectrum(chunks(BEFORE, after), 18, read.difference)
    assert find_causes(read, head, chunks(BEFORE, after), BEFORE.shape) == (cause,)


def test_full_rank_difference_has_no_rank() -> None:
    apart = AFTER - BEFORE
    assert spectrum(chunks(BEFORE, AFTER), 18, float(np.square(apart).sum())).rank is None


@pytest.mark.parametrize("along_rows", [True, False])
def test_swapped_blocks_are_detected(along_rows: bool) -> None:
    order = np.arange(24).reshape(4, 6)[[0, 3, 2, 1]].ravel()
    original = np.tile(BEFORE, (1, 2))[:, :24] + np.arange(24)
    original = original.astype(np.float32)
    after = original[order] if along_rows else original[:, order]
    actual = reordered(chunks(original, after), (24, 24), along_rows)
    assert actual is not None
    assert actual.order == tuple(order) and actual.block == 6 and actual.swapped == (1, 3)
    assert reordered(chunks(original, after + 3 * RANDOM.standard_normal(after.shape).astype(np.float32)), (24, 24),
                     along_rows) is None  # fmt: skip


def test_order_within_heads_is_distinguished_from_swapped_heads() -> None:
    halves = np.array([0, 4, 1, 5, 2, 6, 3, 7])
    assert repeated_within(np.concatenate([halves, halves + 8, halves + 16])) == 8
    assert repeated_within(np.arange(24).reshape(3, 8)[[1, 0, 2]].ravel()) is None


def test_quantization_step_is_recovered_from_values() -> None:
    steps = np.array([[0.25], [0.03]])
    values = (RANDOM.integers(-7, 8, (2, 64)) * steps).astype(np.float32)
    np.testing.assert_allclose(smallest_steps(values), np.broadcast_to(steps, (2, 64)), rtol=1e-4)
