"""What the end of a search takes: times within a part of a short search, and as the recipe says in a long one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from compress.pipeline.target_session import TargetSession
from compress.recipe.recipe import Benchmark
from compress.recipe.search import Search
from compress.search.finish import timed_within, timing_seconds


def search(budget: str) -> Search:
    return Search.model_validate(
        {"budget": budget, "select": {"rows": 100, "from": "train"}, "choices": {"stages.0.epochs": [1, 2]}}
    )


@pytest.mark.parametrize(("budget", "seconds", "within"), [("60s", 12, 12), ("5m", 60, None), ("1h", 60, None)])
def test_a_short_search_takes_times_within_a_fifth(budget: str, seconds: float, within: float | None) -> None:
    assert timing_seconds(search(budget)) == seconds
    assert timed_within(search(budget)) == within


@pytest.mark.parametrize(("own", "given", "used"), [(None, 12.0, 12.0), (30.0, 12.0, 30.0), (None, None, None)])
def test_what_the_recipe_says_of_the_time_for_times_goes_first(
    own: float | None, given: float | None, used: float | None
) -> None:
    road: Any = SimpleNamespace(recipe=SimpleNamespace(benchmark=Benchmark(budget_seconds=own), data=None))
    profile = SimpleNamespace(target=None, threads=None)
    session = TargetSession(road, cast("Any", profile), {}, "train", budget_seconds=given)
    assert session.benchmark.budget_seconds == used
