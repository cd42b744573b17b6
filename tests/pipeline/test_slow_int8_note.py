"""Where INT8 came out slower the report says why; nothing is profiled where it didn't."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from compress.bench import operator_difference, profiled_calls
from compress.bench.difference import CauseDifference, OperatorDifference
from compress.measurement import Measurement
from compress.pipeline.slow_int8_note import slow_int8_notes
from compress.recipe import Recipe
from compress.tasks import get_task


def recipe(*stages: str) -> Recipe:
    data = {"splits": {"train": "train.csv", "test": "test.csv"}}
    given = {"name": "r", "task": "text-classification", "model": "m", "data": data, "baseline": "start"}
    return Recipe.model_validate({**given, "stages": [{stage: {}} for stage in stages]})


def session(*stages: str) -> Any:
    asked = recipe(*stages)
    road = SimpleNamespace(task=get_task(asked.task), recipe=asked, progress=None)
    artifacts = {"baseline": "b", "export": "e", "final": "f"}
    return SimpleNamespace(
        road=road, artifacts=artifacts, target=SimpleNamespace(name="cpu"), examples=lambda label: label
    )


def speed(high: float) -> list[Measurement]:
    return [Measurement(model="final", metric="speedup", target="cpu", value=0.5, unit="", low=0.4, high=high)]


def test_a_slow_file_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    causes = (
        CauseDifference(why="apart", help="do so", more_ms=2.0, layers=("a", "b"), operators=("MatMul", "MatMul")),
        CauseDifference(why="too little to be said", more_ms=0.01, layers=("a",), operators=("Cast",)),
    )
    found = OperatorDifference(
        schema_version=1, float_file="e", int8_file="f", target="cpu", threads=1, batch_size=1, calls=1, passes=7,
        float_ms=2.0, int8_ms=4.0, faster=0.5, low=0.45, high=0.55, layers=(), causes=causes,
    )  # fmt: skip

    def compare(*arguments: Any) -> OperatorDifference:
        asked.append(arguments[:3])
        return found

    monkeypatch.setattr(operator_difference, "compare_operators", compare)
    monkeypatch.setattr(profiled_calls, "batch_calls", lambda examples, size, seed: (examples, size))
    assert slow_int8_notes(session("export", "quantize"), speed(0.55)) == [
        "cpu: INT8 is slower than float: 0.50x as fast (0.45-0.55), 4.00 ms a call for 2.00 ms",
        "cpu: 2 ms more, 100% of the float file's time (MatMul in a, b): apart; what helps: do so",
    ]
    assert asked == [("e", "f", ("final", 1))]


@pytest.mark.parametrize(("stages", "high"), [(("export", "quantize"), 1.01), (("export",), 0.9)])
def test_nothing_is_profiled_where_it_is_not_slower_or_not_of_integers(stages: tuple[str, ...], high: float) -> None:
    assert slow_int8_notes(session(*stages), speed(high)) == []
    assert slow_int8_notes(session(*stages), []) == []
