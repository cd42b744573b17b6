"""The world of the quickstart's space, told from recorded trials, and searches in it."""

from __future__ import annotations

import statistics
from pathlib import Path

import numpy as np
import optuna
import pytest
import search_replay
import search_samplers
from search_emulated import LIMITS, searched
from search_world import World

from compress.plugins.search.outcome import Goal
from compress.plugins.search.space import SearchSpace
from compress.recipe.document import read_document


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


def test_the_engine_finds_the_best_recipe_for_less_than_half_the_cost_of_random_search() -> None:
    replays = search_replay.replay_bound(
        search_replay.load_recorded(search_replay.TABLE), bound=0.88, searches=8, confidence=0.95, size_error=0.0
    )
    ratios = [random / own for own, random in zip(replays.costs, replays.random_costs, strict=True)]
    assert statistics.median(ratios) >= 2
    assert statistics.median(replays.costs) <= 0.3


def test_a_sampler_searches_the_same_recorded_trials() -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    recorded, goal = search_replay.load_recorded(search_replay.TABLE), search_replay.size_goal(0.88)
    results = {
        method: search_samplers.replay_method(method, search_replay.draw_rows(recorded, 1), goal, 1)
        for method in ("engine", "TPESampler 4", "random")
    }
    assert all(result is not None and result["returned"] and 0 < result["cost"] <= 1 for result in results.values())


RECIPES = sorted((Path(__file__).parents[3] / "benchmarks" / "searching").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_each_has_choices_and_rows_enough_for_its_limits(path: Path) -> None:
    space = SearchSpace(read_document(path), path.parent)
    assert space.size > 8
    Goal.from_recipe(space.base).check_resolution(space.search.select.rows)
