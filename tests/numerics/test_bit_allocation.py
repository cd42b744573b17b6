"""Tests of the allocation of bits and channels within a budget, against brute force and integer programs."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import LinearConstraint, milp

from compress.numerics.bit_allocation import Option, allocate_bits
from compress.stages.onnx_int8.accuracy_aware import fewest
from compress.stages.prune.channels import Cost, Count, ladder, least_loss, nearest_rung

Units = list[list[Option]]


def size_of(units: Units, choice: tuple[int, ...]) -> int:
    return sum(options[index].size_bits for options, index in zip(units, choice, strict=True))


def loss_of(units: Units, choice: tuple[int, ...]) -> float:
    return sum(options[index].loss for options, index in zip(units, choice, strict=True))


def layers(count: int, seed: int) -> Units:
    """Return decoder layers at 2 to 8 bits: each bit roughly quarters the loss, sensitivities differ widely."""
    generator = random.Random(seed)
    units = []
    for _ in range(count):
        weights = generator.choice([192 * 576, 576 * 576, 1536 * 576])
        sensitivity = 10 ** generator.gauss(0, 0.7)
        units.append(
            [
                Option(weights * bits + weights // 4, sensitivity * 4.0**-bits * generator.uniform(0.8, 1.2))
                for bits in (2, 3, 4, 5, 8)
            ]
        )
    return units


option = st.builds(Option, st.integers(0, 12), st.integers(-4, 20).map(float))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.lists(option, min_size=1, max_size=4), max_size=5), st.integers(0, 30))
def test_allocation_is_optimal_within_the_budget(units: Units, spare: int) -> None:
    budget = sum(min(option.size_bits for option in options) for options in units) + spare
    actual = allocate_bits(units, budget)
    choices = itertools.product(*(range(len(options)) for options in units))
    within = [choice for choice in choices if size_of(units, choice) <= budget]
    # Whole-numbered losses, so that sums are exact; of equal losses the smallest size.
    least = min((loss_of(units, choice), size_of(units, choice)) for choice in within)
    assert (loss_of(units, actual), size_of(units, actual)) == least


@pytest.mark.parametrize("share", [0.02, 0.3, 0.7])
def test_allocation_of_a_whole_model_matches_an_integer_program(share: float) -> None:
    units = layers(60, seed=1)
    low = size_of(units, (0,) * len(units))
    budget = int(low + share * (size_of(units, (4,) * len(units)) - low))
    actual = allocate_bits(units, budget)
    losses = np.array([option.loss for options in units for option in options])
    sizes = np.array([option.size_bits for options in units for option in options])
    one_each = np.repeat(np.eye(len(units)), 5, axis=1)
    solved = milp(
        losses,
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(sizes / 1e6, ub=budget / 1e6)],
        integrality=np.ones_like(losses),
        bounds=(0, 1),
        options={"mip_rel_gap": 0},
    )
    assert solved.success
    assert size_of(units, actual) <= budget
    assert loss_of(units, actual) == pytest.approx(solved.fun, rel=1e-7)


def test_ties_prefer_smaller_size_then_earlier_option() -> None:
    assert allocate_bits([[Option(8, 1.0), Option(4, 1.0), Option(4, 1.0)]], 8) == (1,)
    assert allocate_bits([[Option(2, 1.0), Option(4, 0.0)]] * 3, 8) == (0, 0, 1)


def test_five_hundred_layers_stay_within_the_budget_and_use_it() -> None:
    units = layers(500, seed=2)
    budget = int(1.4 * size_of(units, (1,) * len(units)))
    actual = allocate_bits(units, budget)
    # Less than the smallest remaining step: nothing more fits.
    smallest = min(
        options[index + 1].size_bits - options[index].size_bits
        for options, index in zip(units, actual, strict=True)
        if index < 4
    )
    assert 0 <= budget - size_of(units, actual) < smallest


def test_infeasible_allocation_is_refused() -> None:
    units = [[Option(20, 1.0), Option(30, 0.5)], [Option(12, 1.0)]]
    assert allocate_bits(units, 32) == (0, 0)
    with pytest.raises(ValueError, match=r"budget of 31 bits fits no choice: the least possible is 32 bits"):
        allocate_bits(units, 31)
    with pytest.raises(ValueError, match="unit 1 has no option"):
        allocate_bits([[Option(1, 1.0)], []], 4)
    with pytest.raises(ValueError, match="unit 0 has an option of 3 bits and loss nan"):
        allocate_bits([[Option(3, float("nan"))]], 4)


@pytest.mark.parametrize("count", [0, 1, 2, 7, 26, 100])
def test_fewest_finds_every_count_with_logarithmic_trials(count: int):
    for answer in range(count + 1):
        tried: list[int] = []

        def holds(k: int, answer: int = answer, tried: list[int] = tried) -> bool:
            tried.append(k)
            return k >= answer

        assert fewest(count, holds) == answer
        assert len(tried) <= 2 + 2 * math.ceil(math.log2(max(answer, 1)))
        assert count not in tried or count == 0


def test_fewest_needs_two_trials_if_one_is_enough():
    tried: list[int] = []
    assert fewest(1000, lambda k: tried.append(k) or k >= 1) == 1
    assert tried == [0, 1]


def test_ladder_lists_the_whole_and_smaller_multiples() -> None:
    assert ladder(24, 8) == [24, 16, 8] and ladder(20, 8) == [20, 16, 8]
    assert ladder(8, 8) == [8] and ladder(5, 8) == [5] and ladder(3, 1) == [3, 2, 1]


def test_nearest_ladder_step() -> None:
    assert [nearest_rung([24, 16, 8], expected) for expected in (23, 20, 19.9, 9, 0.4)] == [24, 24, 16, 8, 8]


def test_channel_cost_is_inputs_times_outputs() -> None:
    cost = Cost(9.0, Count(3.0, {0: 1.0}), Count(0.0, {1: 2.0}))
    assert cost.at([5, 4]) == 9 * (3 + 5) * (2 * 4)


def test_least_important_of_equal_cost_channels_go_first() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = [torch.rand(6, generator=generator), torch.rand(9, generator=generator)]
    costs = [Cost(1.0, Count(1.0), Count(0.0, {index: 1.0})) for index in range(2)]
    remaining = least_loss(scores, [ladder(6, 1), ladder(9, 1)], costs, 7)
    weakest_kept = torch.cat(scores).sort().values[15 - 7]
    assert remaining == [int((actual >= weakest_kept).sum()) for actual in scores]


@pytest.mark.parametrize("limit", [300.0, 200.0, 120.0])
def test_channel_choice_is_close_to_optimal(limit: float) -> None:
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


def test_unreachable_limit_keeps_the_fewest_channels() -> None:
    assert least_loss([torch.ones(6)], [ladder(6, 2)], [Cost(1.0, Count(1.0), Count(4.0, {0: 1.0}))], 5.0) == [2]
