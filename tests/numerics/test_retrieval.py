import numpy as np
import pytest

from compress.numerics import embeddings
from compress.numerics.embeddings import nearest, normalized, overlap, rank_among, ranks, top


def test_a_rank_counts_what_scores_higher_or_as_high() -> None:
    queries = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    corpus = np.array([[3.0, 0.0], [3.0, 1.0], [0.0, 2.0], [1.0, 2.0]])
    # Scores: 3 3 0 1 / 0 1 2 2 / 3 4 2 3.
    expected, given = np.array([0, 3, 3]), np.array([0, 1, 2, 3])
    assert ranks(queries, corpus, expected, given).tolist() == [2, 2, 3]


def test_another_text_with_the_same_words_is_as_right() -> None:
    queries, corpus = np.array([[1.0]]), np.array([[1.0], [5.0], [3.0]])
    assert ranks(queries, corpus, np.array([7]), np.array([7, 7, 8])).tolist() == [1]
    assert ranks(queries, corpus, np.array([7]), np.array([7, 9, 8])).tolist() == [3]


def test_ranks_and_neighbours_are_those_of_a_sorted_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "_CHUNK", 7)  # so that there are several, the last one short
    generator = np.random.default_rng(0)
    queries, corpus = generator.normal(size=(23, 6)), generator.normal(size=(31, 6))
    given = generator.integers(0, 12, 31)
    query_ids = generator.choice(given, 23)
    order = np.argsort(-(queries @ corpus.T), axis=1)
    expected = [
        1 + next(i for i, j in enumerate(row) if given[j] == mine) for row, mine in zip(order, query_ids, strict=True)
    ]
    assert ranks(queries, corpus, query_ids, given).tolist() == expected
    assert np.array_equal(nearest(queries, corpus, 5), order[:, :5])


def test_of_equal_scores_the_first_columns_come_first() -> None:
    assert top(np.array([[1, 2, 2, 0, 2]]), 2).tolist() == [[1, 2]]
    assert top(np.array([[1, 2]]), 10).tolist() == [[1, 0]]


def test_a_candidate_that_is_not_there_has_the_rank_after_the_last() -> None:
    scores, belongs = np.array([[3.0, 2.0], [3.0, 2.0]]), np.array([[False, False], [False, True]])
    assert rank_among(scores, belongs).tolist() == [3, 2]


def test_overlap_is_a_share_of_the_neighbours_in_any_order() -> None:
    assert overlap(np.array([[1, 2, 3, 4]]), np.array([[4, 9, 8, 1]])).tolist() == [0.5]


def test_a_row_of_zeros_stays_one() -> None:
    assert normalized(np.array([[0.0, 0.0], [3.0, 4.0]])).tolist() == [[0.0, 0.0], [0.6, 0.8]]


def test_what_is_among_the_corpus_does_not_find_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "_CHUNK", 7)
    generator = np.random.default_rng(1)
    both, kinds = generator.normal(size=(30, 6)), np.append(generator.integers(0, 4, 29), 9)
    scores = both @ both.T
    order = [[j for j in np.argsort(-row, kind="stable") if j != i] for i, row in enumerate(scores)]
    expected = [
        1 + next((i for i, j in enumerate(row) if kinds[j] == mine), 30) for row, mine in zip(order, kinds, strict=True)
    ]
    # The last one is the only one of its kind.
    assert expected[-1] == 31
    assert ranks(both, both, kinds, kinds, itself=True).tolist() == expected
    assert nearest(both, both, 5, itself=True).tolist() == [row[:5] for row in order]
    assert nearest(both, both, 99, itself=True).shape == (30, 29)
    # With so few, all are candidates, and are scored by their bits.
    exact = ranks(both, np.where(both > 0, 1.0, -1.0), kinds, kinds, itself=True)
    bits = embeddings.binary_ranks(both, both, kinds, kinds, 10, itself=True)
    assert bits[:-1].tolist() == exact[:-1].tolist() and bits[-1] == 30
