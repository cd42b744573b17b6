"""Tests of metrics of detection, retrieval and speech recognition."""

from __future__ import annotations

import itertools

import jiwer
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers.loss.loss_for_object_detection import generalized_box_iou

from compress.numerics import embeddings
from compress.numerics.embeddings import nearest, normalized, overlap, rank_among, ranks, top
from compress.numerics.losses import corners, generalized_overlap, matched_distance
from compress.numerics.statistics import ratio_interval
from compress.numerics.token_metrics import word_errors
from compress.tasks.coco_metrics import precision_influence


def answers(seed: int, queries: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(2, queries, 4, generator=generator)
    return torch.cat([logits, 0.1 + 0.8 * torch.rand(2, queries, 4, generator=generator)], dim=-1)


@pytest.mark.parametrize("separate", [False, True])
def test_matching_has_the_lowest_cost(separate: bool) -> None:
    mine, taught = answers(1)[:1], answers(0)[:1]
    theirs, boxes = taught[0, :, :4], taught[0, :, 4:]
    # Sigmoid outputs are independent classes; otherwise the last class means no object.
    chances = theirs.sigmoid() if separate else theirs.softmax(-1)
    certain = chances.amax(-1) if separate else 1 - chances[:, -1]

    def classes(logits: torch.Tensor) -> torch.Tensor:
        if separate:
            coins = nn.functional.binary_cross_entropy_with_logits(logits, chances, reduction="none")
            return coins.sum(-1)
        return -(chances * logits.log_softmax(-1)).sum(-1)

    def cost(reference: torch.Tensor, gap: float) -> torch.Tensor:
        apart = (reference[:, 4:] - boxes).abs().sum(-1)
        return certain * (5 * apart + 2 * (gap - generalized_overlap(corners(reference[:, 4:]), corners(boxes))))

    orders = [mine[0, list(order)] for order in itertools.permutations(range(4))]
    reference = min(orders, key=lambda order: float((classes(order[:, :4]) + cost(order, 0)).sum()))
    divergence = (classes(reference[:, :4]) - classes(theirs)).sum() / 4
    expected = divergence + cost(reference, 1).sum() / certain.sum().clamp(min=1)
    torch.testing.assert_close(matched_distance(mine, taught, 1.0, 5.0, 2.0, separate=separate), expected)
    same = matched_distance(taught[:, [2, 0, 3, 1]], taught, 2.0, 5.0, 2.0, separate=separate)
    assert float(same) == pytest.approx(0, abs=1e-5)


def test_box_overlaps_equal_transformers() -> None:
    some, others = (corners(answers(seed, 20)[0, :, 4:]) for seed in (0, 1))
    expected = generalized_box_iou(some, others).diagonal()
    torch.testing.assert_close(generalized_overlap(some, others), expected)


def weighted(
    scores: np.ndarray, right: np.ndarray, owners: np.ndarray, objects: np.ndarray, weights: np.ndarray
) -> float:
    """Return the area below monotone precision over recall, computed rank by rank with a weight per image."""
    order = np.argsort(-scores, kind="stable")
    hits = actual = 0.0
    points = []
    for index in order:
        weight = weights[owners[index]]
        hits, actual = hits + weight * right[index], actual + weight
        points.append((hits / (objects * weights).sum(), hits / actual))
    area, original = 0.0, 0.0
    for rank, (recall, _) in enumerate(points):
        area += (recall - original) * max(precision for _, precision in points[rank:])
        original = recall
    return area


def problem(seed: int, pictures: int = 12) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    chance = np.random.default_rng(seed)
    objects = chance.integers(0, 4, pictures)
    objects[0] = 2
    owners = np.repeat(np.arange(pictures), chance.integers(0, 5, pictures))
    right = chance.random(len(owners)) < 0.5
    for picture in range(pictures):  # no more true positives than objects
        reference = np.flatnonzero((owners == picture) & right)
        right[reference[objects[picture] :]] = False
    return chance.random(len(owners)), right, owners, objects


@pytest.mark.parametrize("seed", range(8))
def test_influence_is_the_derivative_of_the_weighted_area(seed: int) -> None:
    scores, right, owners, objects = problem(seed)
    area, influence = precision_influence(scores, right, owners, objects)
    ones = np.ones(len(objects))
    assert area == pytest.approx(weighted(scores, right, owners, objects, ones), abs=1e-12)
    # Where two precisions are equal, which of them is the best depends on the way: the slope lies between both.
    below, above = (
        [
            (weighted(scores, right, owners, objects, ones + step * (np.arange(len(objects)) == picture)) - area) / step
            for picture in range(len(objects))
        ]
        for step in (-1e-6, 1e-6)
    )
    actual = influence / len(objects)
    assert (actual >= np.array(below) - 1e-5).all() and (actual <= np.array(above) + 1e-5).all()
    assert (np.abs(actual) > 1e-3).sum() > 3 and np.isclose(below, above, atol=1e-5).sum() > 2
    assert influence.sum() == pytest.approx(0, abs=1e-9)


def test_area_without_detections_is_zero_and_without_objects_an_error() -> None:
    none = np.zeros(0)
    area, influence = precision_influence(none, none.astype(bool), none.astype(int), np.array([1, 0]))
    assert area == 0 and influence.tolist() == [0, 0]
    with pytest.raises(ValueError, match="at least one object"):
        precision_influence(none, none.astype(bool), none.astype(int), np.array([0, 0]))


def test_rank_counts_higher_and_equal_scores() -> None:
    queries = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    corpus = np.array([[3.0, 0.0], [3.0, 1.0], [0.0, 2.0], [1.0, 2.0]])
    # Scores: 3 3 0 1 / 0 1 2 2 / 3 4 2 3.
    expected, given = np.array([0, 3, 3]), np.array([0, 1, 2, 3])
    assert ranks(queries, corpus, expected, given).tolist() == [2, 2, 3]


def test_duplicate_text_counts_as_correct() -> None:
    queries, corpus = np.array([[1.0]]), np.array([[1.0], [5.0], [3.0]])
    assert ranks(queries, corpus, np.array([7]), np.array([7, 7, 8])).tolist() == [1]
    assert ranks(queries, corpus, np.array([7]), np.array([7, 9, 8])).tolist() == [3]


def test_ranks_and_neighbours_match_a_sorted_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "_CHUNK", 7)  # so that there are several chunks, the last one smaller
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


def test_equal_scores_are_ordered_by_column() -> None:
    assert top(np.array([[1, 2, 2, 0, 2]]), 2).tolist() == [[1, 2]]
    assert top(np.array([[1, 2]]), 10).tolist() == [[1, 0]]


def test_missing_candidate_ranks_after_the_last() -> None:
    scores, belongs = np.array([[3.0, 2.0], [3.0, 2.0]]), np.array([[False, False], [False, True]])
    assert rank_among(scores, belongs).tolist() == [3, 2]


def test_neighbour_overlap_ignores_order() -> None:
    assert overlap(np.array([[1, 2, 3, 4]]), np.array([[4, 9, 8, 1]])).tolist() == [0.5]


def test_normalized_zero_row_stays_zero() -> None:
    assert normalized(np.array([[0.0, 0.0], [3.0, 4.0]])).tolist() == [[0.0, 0.0], [0.6, 0.8]]


def test_query_in_the_corpus_is_not_its_own_match(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "_CHUNK", 7)
    generator = np.random.default_rng(1)
    both, kinds = generator.normal(size=(30, 6)), np.append(generator.integers(0, 4, 29), 9)
    scores = both @ both.T
    order = [[j for j in np.argsort(-row, kind="stable") if j != i] for i, row in enumerate(scores)]
    expected = [
        1 + next((i for i, j in enumerate(row) if kinds[j] == mine), 30) for row, mine in zip(order, kinds, strict=True)
    ]
    # The last row is the only one of its class.
    assert expected[-1] == 31
    assert ranks(both, both, kinds, kinds, itself=True).tolist() == expected
    assert nearest(both, both, 5, itself=True).tolist() == [row[:5] for row in order]
    assert nearest(both, both, 99, itself=True).shape == (30, 29)
    # With so few rows, all are candidates, scored by their bits.
    exact = ranks(both, np.where(both > 0, 1.0, -1.0), kinds, kinds, itself=True)
    bits = embeddings.binary_ranks(both, both, kinds, kinds, 10, itself=True)
    assert bits[:-1].tolist() == exact[:-1].tolist() and bits[-1] == 30


WORDS = st.lists(st.sampled_from(["a", "b", "c", "dd", "e"]), max_size=12)


@given(WORDS.filter(bool), WORDS)
def test_word_errors_equal_jiwer(said: list[str], heard: list[str]):
    actual = jiwer.process_words(" ".join(said), " ".join(heard))
    assert word_errors(said, heard) == actual.substitutions + actual.deletions + actual.insertions


def test_error_rate_is_total_errors_over_total_words():
    assert ratio_interval([1, 0], [1, 9], seed=0).value == pytest.approx(0.1)


def test_interval_has_nominal_coverage():
    generator = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        words = generator.integers(5, 15, 60)
        actual = ratio_interval(generator.binomial(words, 0.1), words, seed, resamples=300)
        covered += actual.low <= 0.1 <= actual.high
    assert 178 <= covered <= 199, covered


def test_error_rate_without_words_is_refused():
    with pytest.raises(ValueError, match="above 0"):
        ratio_interval([1, 2], [0, 0], seed=0)
