"""The world of the quickstart's space, told from recorded trials, and searches in it."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest
import search_replay

from compress.plugins.search.outcome import Goal
from compress.plugins.search.space import SearchSpace
from compress.recipe.document import read_document


def test_the_engine_finds_the_best_recipe_for_less_than_half_the_cost_of_random_search() -> None:
    replays = search_replay.replay_bound(
        search_replay.load_recorded(search_replay.TABLE), bound=0.88, searches=8, confidence=0.95, size_error=0.0
    )
    ratios = [random / own for own, random in zip(replays.costs, replays.random_costs, strict=True)]
    assert statistics.median(ratios) >= 2
    assert statistics.median(replays.costs) <= 0.3


RECIPES = sorted((Path(__file__).parents[3] / "benchmarks" / "searching").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_each_has_choices_and_rows_enough_for_its_limits(path: Path) -> None:
    space = SearchSpace(read_document(path), path.parent)
    assert space.size > 8
    Goal.from_recipe(space.base).check_resolution(space.search.select.rows)
