"""The world of the quickstart's space, told from recorded trials, and searches in it."""

from __future__ import annotations

import numpy as np
import pytest
from search_emulated import LIMITS, searched
from search_world import World


@pytest.fixture(scope="module")
def world() -> World:
    return World.recorded()


def test_what_was_recorded_is_told_again(world: World) -> None:
    sizes = np.array([world.size_bytes(trial.point) / trial.size_bytes for trial in world.trials])
    times = np.array([world.latency_ms(trial.point) / trial.latency_ms for trial in world.trials if trial.latency_ms])
    assert np.abs(sizes - 1).max() < 0.01
    assert np.sqrt(np.mean((times - 1) ** 2)) < 0.1


def test_the_recipe_by_hand_keeps_every_limit(world: World) -> None:
    assert np.mean([world.room(world.by_hand, 1.0, seed) for seed in range(100)]) == pytest.approx(0.005, abs=0.002)
    assert world.size_bytes(world.by_hand) <= LIMITS[1].bound
    assert world.latency_ms(world.by_hand) <= LIMITS[2].bound


def test_a_search_of_a_seed_is_the_same_again(world: World) -> None:
    first, again, other = (searched(world, seed, budget=700) for seed in (3, 3, 4))
    assert repr(first) == repr(again)
    assert repr(first) != repr(other)
    assert first.trials >= 3
