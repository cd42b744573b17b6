"""Tests of the search benchmarks: replays of recorded trials, and the benchmark recipes."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest
import search_replay

from compress.plugins.search.outcome import Goal
from compress.plugins.search.space import SearchSpace
from compress.recipe.document import read_document


def test_search_costs_less_than_half_of_random_search() -> None:
    replays = search_replay.replay_bound(
        search_replay.load_recorded(search_replay.TABLE), bound=0.88, searches=8, confidence=0.95, size_error=0.0
    )
    ratios = [random / own for own, random in zip(replays.costs, replays.random_costs, strict=True)]
    assert statistics.median(ratios) >= 2
    assert statistics.median(replays.costs) <= 0.3


RECIPES = sorted((Path(__file__).parents[3] / "benchmarks" / "searching").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_benchmark_recipes_have_enough_choices_and_rows(path: Path) -> None:
    space = SearchSpace(read_document(path), path.parent)
    assert space.size > 8
    Goal.from_recipe(space.base).check_resolution(space.search.select.rows)
