"""What past runs say of the next one, against a closed form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compress.pipeline.time_history import FILE, History, Timing, predicted_cost
from compress.stages.cost_model import Estimate


def test_a_constant_and_a_slope_come_back() -> None:
    known = [(size, 3.0 + 0.5 * size) for size in (1.0, 10.0, 40.0)]
    assert predicted_cost(known, 100.0) == pytest.approx(53.0)
    assert predicted_cost(known, 0.1) == pytest.approx(3.05)


def test_runs_of_one_size_are_averaged_and_scaled_up_only() -> None:
    known = [(10.0, 2.0), (10.0, 8.0)]
    assert predicted_cost(known, 10.0) == pytest.approx(4.0)
    assert predicted_cost(known, 30.0) == pytest.approx(12.0)
    assert predicted_cost(known, 1.0) == pytest.approx(4.0)


def test_a_cost_that_falls_with_work_is_taken_as_constant() -> None:
    assert predicted_cost([(1.0, 4.0), (100.0, 3.0)], 50.0) == pytest.approx(3.36)


def timing(seconds: float, **other: object) -> Timing:
    return Timing.now("export by parameters", "fill-mask", 1000.0, seconds, 5_000_000).model_copy(update=other)


def test_only_the_same_work_on_the_same_kind_of_machine_counts(tmp_path: Path) -> None:
    History(tmp_path).add([timing(4.0), timing(99.0, processor="other"), timing(99.0, cores=512)])
    History(tmp_path).add([timing(99.0, task="text-ranking"), timing(99.0, kind="export by examples")])
    found = History(tmp_path).seconds("export by parameters", "fill-mask", 1000.0)
    assert found is not None and found.value == pytest.approx(4.0) and "one run" in found.note
    memory = History(tmp_path).peak_memory("export by parameters", "fill-mask", 2000.0)
    assert memory is not None and memory.value == pytest.approx(10_000_000)
    assert History(tmp_path).seconds("quantize by parameters", "fill-mask", 1000.0) is None
    assert History(tmp_path).seconds("export by parameters", "fill-mask", None) is None


def test_lines_that_are_cut_short_are_passed_over(tmp_path: Path) -> None:
    History(tmp_path).add([timing(4.0)])
    with (tmp_path / FILE).open("a") as file:
        file.write('{"kind": "exp')
    found = History(tmp_path).seconds("export by parameters", "fill-mask", 1000.0)
    assert found is not None and found.value == pytest.approx(4.0)


def test_a_file_of_thousands_of_lines_loses_the_oldest(tmp_path: Path) -> None:
    History(tmp_path).add(timing(float(number + 1)) for number in range(2001))
    History(tmp_path).add([timing(7.0)])
    lines = (tmp_path / FILE).read_text().splitlines()
    assert len(lines) == 1001 and json.loads(lines[-1])["seconds"] == 7.0 and json.loads(lines[0])["seconds"] == 1002.0


def test_a_prediction_is_corrected_by_what_came_of_those_before(tmp_path: Path) -> None:
    """Of the stage and task the factors 2, 3 and 8 have the median 3; other stages, half as fast, have no say then."""
    other = timing(20.0, kind="distill by FLOPs", told_by="trial", told_seconds=10.0)
    short = timing(0.1, kind="prune by examples", told_by="trial", told_seconds=1.0)
    own = [timing(10.0 * factor, told_by="trial", told_seconds=10.0) for factor in (2.0, 3.0, 8.0)]
    told = Estimate(value=7.0, note="tried")
    History(tmp_path).add([other, short])
    found = History(tmp_path).corrected(told, "export by parameters", "fill-mask", "trial")
    assert found is not None and found.value == pytest.approx(14.0) and "other stages" in found.note
    History(tmp_path).add(own)
    found = History(tmp_path).corrected(told, "export by examples", "fill-mask", "trial")
    assert found is not None and found.value == pytest.approx(21.0) and "3 runs of the stage" in found.note
    # The farthest of the factors is 8/3 of the median.
    assert found.low == pytest.approx(21.0 * 3 / 8) and found.high == pytest.approx(21.0 * 8 / 3)
    history = History(tmp_path)
    assert history.corrected(told, "export by parameters", "fill-mask", "arithmetic") is None
    assert history.corrected(Estimate.unknown("why"), "export by parameters", "fill-mask", "trial") is None


def test_memory_is_corrected_by_bytes(tmp_path: Path) -> None:
    History(tmp_path).add([timing(9.0, told_by="trial", told_seconds=9.0, told_bytes=2_500_000.0)])
    told = Estimate(value=1e6, note="")
    found = History(tmp_path).corrected(told, "export by parameters", "fill-mask", "trial", "bytes")
    assert found is not None and found.value == pytest.approx(2e6)  # 5 MB came of 2.5 MB
