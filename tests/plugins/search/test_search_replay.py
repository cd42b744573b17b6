"""Searches replayed on recorded trials of a real space."""

from __future__ import annotations

import statistics

import optuna
import search_replay
import search_samplers


def test_the_engine_finds_the_best_recipe_for_less_than_half_the_cost_of_random_search() -> None:
    replays = search_replay.replay_bound(
        search_replay.load_recorded(search_replay.TABLE), bound=0.88, searches=24, confidence=0.95, size_error=0.0
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
