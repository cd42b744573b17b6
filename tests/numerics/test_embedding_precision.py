import numpy as np

from compress.numerics.embeddings import (
    RESCORED,
    binary_ranks,
    from_int8,
    hamming,
    ranges_of,
    to_int8,
    to_ubinary,
)


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


def test_a_dimension_that_never_changes_is_no_division_by_zero() -> None:
    embeddings = np.full((3, 1), 0.25, np.float32)
    assert np.isfinite(from_int8(to_int8(embeddings, ranges_of(embeddings)), ranges_of(embeddings))).all()


def test_bits_are_packed_from_the_highest_on() -> None:
    assert to_ubinary(np.array([[1, -1, 1, -1, -1, -1, -1, 2, 5.0]])).tolist() == [[0b10100001, 0b10000000]]


def test_hamming_counts_signs_that_differ() -> None:
    generator = np.random.default_rng(0)
    item, other = generator.normal(size=(4, 20)), generator.normal(size=(6, 20))
    expected = ((item > 0)[:, None] != (other > 0)[None]).sum(axis=2)
    assert np.array_equal(hamming(to_ubinary(item), to_ubinary(other)), expected)


def test_binary_search_takes_candidates_by_bits_and_orders_them_by_the_exact_query() -> None:
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
