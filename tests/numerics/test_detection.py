"""Distances of sets of detections: matched by brute force, overlaps as transformers computes them."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers.loss.loss_for_object_detection import generalized_box_iou

from compress.numerics.detection import corners, generalized_overlap, matched_distance


def answers(seed: int, queries: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(2, queries, 4, generator=generator)
    return torch.cat([logits, 0.1 + 0.8 * torch.rand(2, queries, 4, generator=generator)], dim=-1)


def test_the_order_of_queries_does_not_count() -> None:
    taught = answers(0)
    for order in ([3, 1, 0, 2], [1, 0, 3, 2]):
        assert float(matched_distance(taught[:, order], taught, 2.0, 5.0, 2.0)) == pytest.approx(0, abs=1e-5)
    assert float(matched_distance(answers(1), taught, 2.0, 5.0, 2.0)) > 0.5


def test_the_matching_is_the_cheapest_of_all() -> None:
    mine, taught = answers(1)[:1], answers(0)[:1]

    def cost(order: tuple[int, ...]) -> float:
        reference = mine[0, list(order)]
        probabilities = taught[0, :, :4].softmax(-1)
        classes = -(probabilities * reference[:, :4].log_softmax(-1)).sum(-1)
        overlap = generalized_overlap(corners(reference[:, 4:]), corners(taught[0, :, 4:]))
        apart = (reference[:, 4:] - taught[0, :, 4:]).abs().sum(-1)
        return float((classes + (1 - probabilities[:, -1]) * (5 * apart - 2 * overlap)).sum())

    best = min(itertools.permutations(range(4)), key=cost)
    reference, theirs = mine[0, list(best)], taught[0]
    seen = 1 - theirs[:, :4].softmax(-1)[:, -1]
    classes = torch.nn.functional.kl_div(
        reference[:, :4].log_softmax(-1), theirs[:, :4].softmax(-1), reduction="batchmean"
    )
    gap = 1 - generalized_overlap(corners(reference[:, 4:]), corners(theirs[:, 4:]))
    boxes = (seen * (5 * (reference[:, 4:] - theirs[:, 4:]).abs().sum(-1) + 2 * gap)).sum() / seen.sum().clamp(min=1)
    torch.testing.assert_close(matched_distance(mine, taught, 1.0, 5.0, 2.0), classes + boxes)


def test_classes_that_are_separate_are_as_many_coins() -> None:
    mine, taught = answers(1)[:1], answers(0)[:1]
    heads = taught[0, :, :4].sigmoid()

    def apart(reference: torch.Tensor) -> torch.Tensor:
        return (reference[:, 4:] - taught[0, :, 4:]).abs().sum(-1)

    def gap(reference: torch.Tensor) -> torch.Tensor:
        return 1 - generalized_overlap(corners(reference[:, 4:]), corners(taught[0, :, 4:]))

    def cost(order: tuple[int, ...]) -> float:
        reference = mine[0, list(order)]
        coins = -(heads * reference[:, :4].sigmoid().log() + (1 - heads) * (1 - reference[:, :4].sigmoid()).log()).sum(
            -1
        )
        return float((coins + heads.amax(-1) * (5 * apart(reference) + 2 * gap(reference))).sum())

    reference = mine[0, list(min(itertools.permutations(range(4)), key=cost))]
    tossed = reference[:, :4].sigmoid()
    classes = (heads * (heads / tossed).log() + (1 - heads) * ((1 - heads) / (1 - tossed)).log()).sum() / 4
    seen = heads.amax(-1)
    boxes = (seen * (5 * apart(reference) + 2 * gap(reference))).sum() / seen.sum().clamp(min=1)
    actual = matched_distance(mine, taught, 1.0, 5.0, 2.0, separate=True)
    torch.testing.assert_close(actual, classes + boxes)
    assert float(matched_distance(taught[:, [2, 0, 3, 1]], taught, 2.0, 5.0, 2.0, separate=True)) < 1e-5


def test_overlaps_are_those_of_transformers() -> None:
    some, others = (corners(answers(seed, 20)[0, :, 4:]) for seed in (0, 1))
    expected = generalized_box_iou(some, others).diagonal()
    torch.testing.assert_close(generalized_overlap(some, others), expected)
