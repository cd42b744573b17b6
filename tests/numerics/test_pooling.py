"""Tests of pooling, rotation and precisions of embeddings."""

import numpy as np
import pytest
import torch

from compress.numerics.embeddings import (
    RESCORED,
    binary_ranks,
    from_int8,
    hamming,
    principal_rotation,
    ranges_of,
    retained_share,
    to_int8,
    to_ubinary,
)
from compress.numerics.pooling import POOLING_MODES, pool

HIDDEN = torch.from_numpy(np.random.default_rng(0).normal(size=(3, 5, 4)).astype(np.float32))
MASKS = {
    "right": [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]],
    "left": [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]],
}


def one_by_one(rows: np.ndarray, mode: str) -> np.ndarray:
    """Return the pooled embedding of the real tokens [L, H] of one text, for each mode by its definition."""
    places = np.arange(1, len(rows) + 1)[:, None]
    return {
        "cls": rows[0],
        "lasttoken": rows[-1],
        "max": rows.max(axis=0),
        "mean": rows.sum(axis=0) / len(rows),
        "mean_sqrt_len_tokens": rows.sum(axis=0) / np.sqrt(len(rows)),
        "weightedmean": (rows * places).sum(axis=0) / places.sum(),
    }[mode]


@pytest.mark.parametrize("side", MASKS)
@pytest.mark.parametrize("mode", POOLING_MODES)
def test_padding_on_either_side_is_ignored(mode: str, side: str) -> None:
    mask = torch.tensor(MASKS[side])
    expected = [one_by_one(rows[keep == 1].numpy(), mode) for rows, keep in zip(HIDDEN, mask, strict=True)]
    np.testing.assert_allclose(pool(HIDDEN, mask, (mode,)), expected, rtol=1e-5, atol=1e-6)


def test_several_modes_are_concatenated_in_order() -> None:
    mask = torch.tensor(MASKS["right"])
    both = pool(HIDDEN, mask, ("max", "cls"))
    assert torch.equal(both, torch.cat([pool(HIDDEN, mask, ("max",)), HIDDEN[:, 0]], dim=1))


def test_int8_has_256_steps_of_each_range() -> None:
    ranges = np.array([[0.0, -1.0], [255.0, 1.0]])
    actual = to_int8(np.array([[0.0, -1.0], [255.0, 1.0], [127.9, 0.0], [300.0, -2.0]]), ranges)
    assert actual.dtype == np.int8
    assert actual.tolist() == [[-128, -128], [127, 127], [-1, -1], [127, -128]]


def test_int8_is_off_by_half_a_step_at_most() -> None:
    embeddings = np.random.default_rng(0).normal(size=(200, 5)).astype(np.float32)
    ranges = ranges_of(embeddings)
    step = (ranges[1] - ranges[0]) / 255
    assert (np.abs(from_int8(to_int8(embeddings, ranges), ranges) - embeddings) <= 0.5001 * step).all()


def test_constant_dimension_causes_no_division_by_zero() -> None:
    embeddings = np.full((3, 1), 0.25, np.float32)
    assert np.isfinite(from_int8(to_int8(embeddings, ranges_of(embeddings)), ranges_of(embeddings))).all()


def test_bits_are_packed_from_the_most_significant() -> None:
    assert to_ubinary(np.array([[1, -1, 1, -1, -1, -1, -1, 2, 5.0]])).tolist() == [[0b10100001, 0b10000000]]


def test_hamming_distance_counts_differing_signs() -> None:
    generator = np.random.default_rng(0)
    item, other = generator.normal(size=(4, 20)), generator.normal(size=(6, 20))
    expected = ((item > 0)[:, None] != (other > 0)[None]).sum(axis=2)
    assert np.array_equal(hamming(to_ubinary(item), to_ubinary(other)), expected)


def test_binary_search_reranks_candidates_with_the_float_query() -> None:
    generator = np.random.default_rng(1)
    queries, corpus = generator.normal(size=(300, 16)), generator.normal(size=(90, 16))
    query_ids, k = generator.integers(0, 90, 300), 3
    actual = binary_ranks(queries, corpus, query_ids, np.arange(90), k)
    for query, mine, rank in zip(queries, query_ids, actual, strict=True):
        distances = ((query > 0) != (corpus > 0)).sum(axis=1)
        candidates = sorted(range(90), key=lambda j: (distances[j], j))[: RESCORED * k]
        scores = {j: query @ np.where(corpus[j] > 0, 1, -1) for j in candidates}
        expected = sum(scores[j] >= scores[mine] for j in candidates) if mine in scores else RESCORED * k + 1
        assert rank == expected


def test_kept_dimensions_have_the_largest_singular_values() -> None:
    generator = np.random.default_rng(0)
    embeddings = (generator.normal(size=(50, 8)) * [9, 1, 5, 1, 1, 3, 1, 1] + 2).astype(np.float32)
    values = np.linalg.svd(embeddings.astype(np.float64), compute_uv=False) ** 2
    for dimensions in (1, 3, 8):
        rotation = principal_rotation(embeddings, dimensions)
        assert retained_share(embeddings, rotation) == pytest.approx(values[:dimensions].sum() / values.sum(), rel=1e-5)
        np.testing.assert_allclose(rotation @ rotation.T, np.eye(dimensions), atol=1e-6)


def test_rotation_to_all_dimensions_preserves_products() -> None:
    embeddings = np.random.default_rng(0).normal(size=(20, 6)).astype(np.float32)
    rotated = embeddings @ principal_rotation(embeddings, 6).T
    np.testing.assert_allclose(rotated @ rotated.T, embeddings @ embeddings.T, atol=1e-4)


def test_rows_are_signed_by_their_largest_entry() -> None:
    assert (principal_rotation(-np.eye(4, 3, dtype=np.float32), 3).max(axis=1) > 0.99).all()


@pytest.mark.parametrize(("dimensions", "words"), [(9, "9 of 8 dimensions"), (0, "0 of 8"), (7, "5 embeddings do not")])
def test_keeping_too_many_dimensions_is_refused(dimensions: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        principal_rotation(np.ones((5, 8), np.float32), dimensions)
