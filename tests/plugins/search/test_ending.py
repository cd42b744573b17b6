"""What the end of a search takes: times within a part of a short search, and as the recipe says in a long one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from compress.pipeline.target_session import TargetSession
from compress.plugins.search.final_evaluation import FinalEvaluation, expected_timing_seconds, timing_budget
from compress.recipe.recipe import Benchmark
from compress.recipe.search import Search


def search(budget: str) -> Search:
    return Search.model_validate(
        {"budget": budget, "select": {"rows": 100, "from": "train"}, "choices": {"stages.0.epochs": [1, 2]}}
    )


@pytest.mark.parametrize(("budget", "seconds", "within"), [("60s", 12, 12), ("5m", 60, None), ("1h", 60, None)])
def test_a_short_search_takes_times_within_a_fifth(budget: str, seconds: float, within: float | None) -> None:
    assert expected_timing_seconds(search(budget)) == seconds
    assert timing_budget(search(budget)) == within


@pytest.mark.parametrize(("own", "given", "used"), [(None, 12.0, 12.0), (30.0, 12.0, 30.0), (None, None, None)])
def test_what_the_recipe_says_of_the_time_for_times_goes_first(
    own: float | None, given: float | None, used: float | None
) -> None:
    runner: Any = SimpleNamespace(recipe=SimpleNamespace(benchmark=Benchmark(budget_seconds=own), data=None))
    profile = SimpleNamespace(target=None, threads=None)
    session = TargetSession(runner, cast("Any", profile), {}, "train", budget_seconds=given)
    assert session.benchmark.budget_seconds == used


def ending(ranked: list[tuple[int, ...]], refit: bool = True, width: int = 1, budget: str = "20m") -> FinalEvaluation:
    """Of a search in which a training takes 100 s, a refit a tenth more, and judging 15 s."""
    observations = SimpleNamespace(ranked=lambda: ranked, by_shortfall=lambda: [(0,)])
    return FinalEvaluation(
        space=cast("Any", SimpleNamespace(search=search(budget), origin=(0,))),
        costs=cast("Any", SimpleNamespace(evaluation_seconds=15.0, corrected_total_seconds=lambda point: 100.0)),
        engine=cast("Any", SimpleNamespace(observations=observations, shares=(1 / 3, 1.0))),
        trials=cast("Any", SimpleNamespace(workers=SimpleNamespace(width=width))),
        refit=cast("Any", SimpleNamespace(enabled=refit, more_rows=0.1)),
    )


def test_while_there_is_no_winner_no_time_is_kept_for_its_seeds() -> None:
    session = 60 + 2 * 15
    assert ending([]).reserved_seconds() == pytest.approx(session + 110)
    assert ending([(1,)]).reserved_seconds() == pytest.approx(session + 3 * 110)
    assert ending([(1,)], refit=False).reserved_seconds() == pytest.approx(session + 2 * 100)
    assert ending([(1,)], budget="5m").reserved_seconds() == pytest.approx(session + 150), "at most half of it"


@pytest.mark.parametrize(
    ("left", "width", "seeds"), [(1000, 1, 2), (90 + 331, 1, 2), (90 + 329, 1, 1), (90 + 219, 1, 0), (-5, 1, 0),
                                 (90 + 166, 2, 2)],
)  # fmt: skip
def test_as_many_seeds_are_trained_as_there_is_time_for(left: float, width: int, seeds: int) -> None:
    assert ending([(1,)], width=width).affordable_seeds((1,), True, left) == seeds
