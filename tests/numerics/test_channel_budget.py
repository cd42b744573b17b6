"""Costs against closed forms, and the choice of what to keep against brute force."""

from __future__ import annotations

import itertools

import pytest
import torch

from compress.stages.prune.channel_costs import Cost, Count, ladder, least_loss, nearest_rung


def test_rungs_are_multiples_below_the_whole() -> None:
    assert ladder(24, 8) == [24, 16, 8] and ladder(20, 8) == [20, 16, 8]
    assert ladder(8, 8) == [8] and ladder(5, 8) == [5] and ladder(3, 1) == [3, 2, 1]


def test_the_nearest_rung() -> None:
    assert [nearest_rung([24, 16, 8], expected) for expected in (23, 20, 19.9, 9, 0.4)] == [24, 24, 16, 8, 8]


def test_a_cost_is_inputs_by_outputs() -> None:
    cost = Cost(9.0, Count(3.0, {0: 1.0}), Count(0.0, {1: 2.0}))
    assert cost.at([5, 4]) == 9 * (3 + 5) * (2 * 4)


def test_of_channels_that_cost_alike_the_least_important_go() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = [torch.rand(6, generator=generator), torch.rand(9, generator=generator)]
    costs = [Cost(1.0, Count(1.0), Count(0.0, {index: 1.0})) for index in range(2)]
    remaining = least_loss(scores, [ladder(6, 1), ladder(9, 1)], costs, 7)
    weakest_kept = torch.cat(scores).sort().values[15 - 7]
    assert remaining == [int((actual >= weakest_kept).sum()) for actual in scores]


@pytest.mark.parametrize("limit", [300.0, 200.0, 120.0])
def test_the_choice_comes_near_the_best_there_is(limit: float) -> None:
    generator = torch.Generator().manual_seed(1)
    scores = [torch.rand(size, generator=generator) * size for size in (6, 8, 5)]
    rungs = [ladder(len(actual), 1) for actual in scores]
    counts = [Count(0.0, {index: 1.0}) for index in range(3)]
    costs = [Cost(9.0, Count(1.0), counts[0]), Cost(4.0, counts[0], counts[1]), Cost(2.0, counts[1], counts[2])]

    def loss(remaining: tuple[int, ...]) -> float:
        lowest = (actual.sort().values[: len(actual) - n] for actual, n in zip(scores, remaining, strict=True))
        return float(sum(actual.sum() for actual in lowest))

    remaining = least_loss(scores, rungs, costs, limit)
    allowed = [choice for choice in itertools.product(*rungs) if sum(cost.at(choice) for cost in costs) <= limit]
    assert tuple(remaining) in allowed
    assert loss(tuple(remaining)) <= 1.4 * min(loss(choice) for choice in allowed)


def test_where_the_limit_is_out_of_reach_as_little_as_can_be() -> None:
    assert least_loss([torch.ones(6)], [ladder(6, 2)], [Cost(1.0, Count(1.0), Count(4.0, {0: 1.0}))], 5.0) == [2]
