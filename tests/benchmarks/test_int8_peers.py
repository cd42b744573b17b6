"""The table of INT8 by everyone's defaults: which way figures point, and the whole of it on a tiny Whisper."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from peers.int8_table import Line, Table, behind
from tiny_speech import TASK, write_speech

from compress.results.report import Measurement

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("int8")


def row(model: str, metric: str, outcomes: list[float]) -> Measurement:
    value = sum(outcomes) / len(outcomes)
    return Measurement(
        model=model, metric=metric, target="cpu", value=value, unit="ratio", n=len(outcomes), raw=tuple(outcomes)
    )


@pytest.mark.parametrize(("metric", "expected"), [("accuracy", 0.25), ("word_error_rate", -0.25)])
def test_better_is_more_right_answers_and_fewer_errors(bench: Any, metric: str, expected: float) -> None:
    ours, other = row("ours", metric, [1, 1, 1, 0] * 5), row("other", metric, [1, 0, 1, 0] * 5)
    value, low, high = bench._better(ours, other)
    assert value == pytest.approx(expected) and low < value < high
    assert bench._better(other, ours)[0] == pytest.approx(-expected)


def line(name: str, better: tuple[float, float, float], faster: float | None) -> Line:
    return Line(name, 0.9, *better, 1.0, 100, "", 1.0, faster)


def test_chance_and_two_in_a_hundred_are_not_behind() -> None:
    lines = [
        line("fp32", (-0.1, -0.2, -0.05), 0.5),
        line("ours, dynamic", (-0.1, -0.2, -0.05), 0.5),
        line("worse by chance", (-0.01, -0.03, 0.01), 0.985),
        line("right", (-0.02, -0.03, -0.01), 2.0),
        line("quick", (0.02, 0.01, 0.03), 0.97),
    ]
    assert behind(Table("r", "accuracy", lines, [])) == ["ours is worse than: right", "ours is slower than: quick"]


@pytest.mark.slow
def test_the_whole_of_it_on_a_tiny_whisper(
    bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = {"splits": write_speech(tmp_path)}
    recipe = {
        "name": "tiny",
        "task": TASK,
        "model": "model",
        "data": data,
        "stages": ["onnx", {"onnx_int8": {"part": "encoder"}}, {"onnx_weight_only": {"part": "decoder", "bits": 4}}],
        "benchmark": {"threads": 1, "examples": 8},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    bench.main([tmp_path / "tiny.yaml"], tmp_path / "artifacts", 0, False, tmp_path / "out.json")
    first = capsys.readouterr().out
    (table,) = json.loads((tmp_path / "out.json").read_text())
    lines_by_name = {line["name"]: line for line in table["lines"]}
    assert lines_by_name["fp32"]["same"] == lines_by_name["fp32 of the plain export"]["same"] == 1.0
    assert (
        lines_by_name["ours"]["size_bytes"]
        < lines_by_name["ONNX Runtime dynamic"]["size_bytes"]
        < lines_by_name["fp32"]["size_bytes"]
    )
    failed = {note.partition(":")[0] for note in table["notes"]}
    peers = {
        f"{name}{of}" for name in ("ONNX Runtime dynamic", "ONNX Runtime static", "NNCF") for of in ("", bench.PLAIN)
    }
    assert peers <= lines_by_name.keys() | failed and not lines_by_name.keys() & failed
    for again in (False, True):
        monkeypatch.setattr(bench, "write_files", None)  # The table is there: no file is made.
        bench.main([tmp_path / "tiny.yaml"], tmp_path / "artifacts", 0, again, None)
        assert capsys.readouterr().out == first
