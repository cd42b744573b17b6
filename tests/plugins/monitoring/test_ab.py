"""Tests of A/B tests on recorded traffic: reading, sequential verdicts and the command."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from tiny_use import Done, write_run

from compress.data.columns import Column
from compress.plugins.monitoring.ab import ServedRequests, judge_answers, judge_times, stretches
from compress.plugins.monitoring.traffic import read_traffic
from compress.utils.errors import DataError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
Run = Callable[..., Done]
TEXT = (Column("text"),)


def write(path: Path, *lines: dict[str, Any]) -> Path:
    """Write one JSON object per line."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_labels_arrive_with_a_request_or_later(tmp_path: Path) -> None:
    file = write(
        tmp_path / "traffic.jsonl",
        {"id": 1, "at": "2026-11-28T12:00:00", "text": "first"},
        {"id": "c", "at": "2026-11-28T12:00:02.5+00:00", "text": "third"},
        {"id": "b", "at": "2026-11-28T13:00:01+01:00", "text": "second", "label": "good"},
        {"id": "c", "label": "bad"},
    )
    late = write(tmp_path / "late.jsonl", {"id": "1", "label": "good"}, {"id": "c", "label": "bad"})
    traffic = read_traffic(file, TEXT, late)
    assert traffic.table["text"].to_pylist() == ["first", "second", "third"]
    assert traffic.at.tolist() == [0.0, 1.0, 2.5]
    assert list(traffic.labels) == [(1, "good"), (2, "bad"), (0, "good")]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"text": "a"}], "no time of arrival: 'at' is None"),
        ([{"text": "a", "at": "noon"}], "no time of arrival: 'at' is 'noon'"),
        ([{"text": "a", "at": 0, "id": 1}, {"text": "b", "at": 1, "id": 1}], "Two requests have the id 1."),
        (
            [{"text": "a", "at": 0, "id": "abc"}, {"id": "abd", "label": "x"}],
            "A label is of no request: its id is 'abd'.",
        ),
        ([{"text": "a", "at": 0, "id": 1, "label": "x"}, {"id": 1, "label": "y"}], "differ: x and y"),
        ([{"id": 1, "label": "x"}], "has no request"),
    ],
)
def test_invalid_traffic_is_refused(tmp_path: Path, lines: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(DataError) as error:
        read_traffic(write(tmp_path / "traffic.jsonl", *lines), TEXT)
    assert message in error.value.what


def test_stretches_contain_every_request_once() -> None:
    for count in (1, 4, 39, 200, 1003):
        parts = stretches(np.arange(count, dtype=float))
        assert [number for part in parts for number in part] == list(range(count))
        assert len(parts) <= 40
        assert min(map(len, parts)) >= min(5, count)


def test_accuracy_verdict_comes_when_the_betting_wealth_suffices() -> None:
    labels = [(number, "x") for number in range(60)]
    better = judge_answers(["y"] * 60, ["x"] * 60, labels, 0.05, 0.01)
    # A stake of s multiplies by 1 + s at every win; half of the stakes bet on the opposite outcome.
    stakes = np.geomspace(0.01, 0.5, 24)
    first = next(n for n in range(1, 60) if np.mean(np.concatenate([(1 + stakes) ** n, (1 - stakes) ** n])) >= 20)
    assert (better.verdict, better.decided_after, better.change) == ("better", first, 1.0)
    worse = judge_answers(["x"] * 60, ["y"] * 60, labels, 0.05, 0.01)
    assert (worse.verdict, worse.decided_after, worse.a, worse.b) == ("worse", first, 1.0, 0.0)


def test_equal_predictions_are_same_after_enough_labels() -> None:
    labels = [(number, "x") for number in range(900)]
    few = judge_answers(["x"] * 900, ["x"] * 900, labels[:100], 0.05, 0.01)
    many = judge_answers(["x"] * 900, ["x"] * 900, labels, 0.05, 0.02)
    assert (few.verdict, few.decided_after, many.verdict) == ("can't tell", None, "same")


def test_times_are_compared_by_median_of_stretches() -> None:
    first, second = ServedRequests([1.0, 2.0, 3.0, 9.0], 40.0), ServedRequests([1.5, 3.0, 4.5, 9.0], 20.0)
    served = [{"A": first, "B": second} for _ in range(12)]
    judgements = {judgement.name: judgement for judgement in judge_times(served, 0.05, 0.05)}
    assert {name: judgement.verdict for name, judgement in judgements.items()} == {
        "latency at p50": "worse", "latency at p99": "same", "processor time a request": "better",
    }  # fmt: skip
    # A verdict needs eight stretches in agreement: 2^8 / 9 > 20.
    assert {judgement.decided_after for judgement in judgements.values()} == {8}
    assert judgements["latency at p50"].change == pytest.approx(0.5)
    assert (judgements["latency at p50"].a, judgements["processor time a request"].a) == (2.0, 10.0)


@pytest.fixture(scope="module")
def traffic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write 240 requests in half a second, and their labels in a separate file."""
    folder, rows = tmp_path_factory.mktemp("traffic"), tiny.table(240, seed=7).to_pylist()
    write(
        folder / "labels.jsonl",
        *({"id": number, "label": row["label"]} for number, row in reversed(list(enumerate(rows)))),
    )
    requests = ({"id": number, "at": number / 480, "text": row["text"]} for number, row in enumerate(rows))
    return write(folder / "traffic.jsonl", *requests)


def test_model_with_missing_words_is_worse(run_folder: Path, tmp_path: Path, traffic: Path, compress: Run) -> None:
    other = write_run(tmp_path / "b", forgets=tiny.GOOD)
    late = traffic.with_name("labels.jsonl")
    done = compress("ab", run_folder, other, "--traffic", traffic, "--labels", late, "--json", "--threads", "1")
    answer = json.loads(done.stdout)
    judged = {judgement["name"]: judgement for judgement in answer["judged"]}
    assert done.code == 1, done.stderr
    assert (answer["requests"], answer["labeled"]) == (240, 240)
    assert judged["accuracy"]["verdict"] == "worse"
    assert judged["accuracy"]["decided_after"] < 240
    assert judged["size"]["verdict"] == "same"
    assert judged["latency at p50"]["observations"] == 40
    assert all(math.isfinite(judged[name]["a"]) for name in ("latency at p50", "latency at p99"))


def test_label_outside_the_classes_is_refused(run_folder: Path, tmp_path: Path, compress: Run) -> None:
    file = write(tmp_path / "traffic.jsonl", {"at": 0, "text": "the film", "label": "so-so"})
    done = compress("ab", run_folder, run_folder, "--traffic", file, "--answers-only")
    assert (done.code, done.stdout) == (2, "")
    assert "The label 'so-so' is none of the model's classes." in done.stderr
