"""The table of INT8 by everyone's defaults: which way figures point, and the whole of it on a tiny Whisper."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from onnx_graphs import write_classifier
from peers.int8_files import write_files
from peers.int8_table import Line, Table, behind, clear_others, keep, kept
from tiny_speech import TASK, write_speech

from compress.formats.onnx.model import OnnxModel
from compress.recipe.loading import read_recipe
from compress.results.measurement import Measurement
from compress.utils.errors import InputError
from compress.utils.progress import SilentProgress

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
    assert behind(Table("r", "accuracy", lines, [])) == [
        "ours is worse than: right",
        "ours is slower than: quick",
    ]


def test_a_ratio_is_turned_round_with_its_interval(bench: Any) -> None:
    speedup = Measurement(model="x", metric="speedup", target="cpu", value=0.5, unit="x", low=0.4, high=0.8)
    assert bench._ratio(speedup) == {"faster": 2.0, "faster_low": 1.25, "faster_high": 2.5}


def test_a_stopped_run_goes_on_with_the_file_it_was_at(tmp_path: Path) -> None:
    model = OnnxModel.load(write_classifier(tmp_path / "source", 8, 1), "text-classification")
    calls: list[str] = []

    def made(name: str, stopped: bool = False) -> Callable[[], OnnxModel]:
        def way() -> OnnxModel:
            calls.append(name)
            if stopped:
                raise KeyboardInterrupt
            return model

        return way

    folder = tmp_path / "files"
    with pytest.raises(KeyboardInterrupt):
        write_files({"ours": made("ours"), "theirs": made("theirs", stopped=True)}, folder, SilentProgress())
    written_files, notes = write_files({"ours": made("ours"), "theirs": made("theirs")}, folder, SilentProgress())
    assert calls == ["ours", "theirs", "theirs"] and not notes
    assert [path.name for path in sorted(folder.iterdir())] == ["ours", "theirs"]
    assert written_files == {name: folder / name for name in ("ours", "theirs")}


def test_a_file_that_fails_leaves_nothing_and_is_tried_again(tmp_path: Path) -> None:
    def fails() -> OnnxModel:
        raise ValueError("no such operator")

    for _ in range(2):
        assert write_files({"theirs": fails}, tmp_path, SilentProgress()) == (
            {},
            ["theirs: no file, ValueError: no such operator"],
        )
        assert not any(tmp_path.iterdir())


def test_a_table_is_kept_until_the_stages_change(tmp_path: Path) -> None:
    folder = tmp_path / "files"
    clear_others(folder, "first")
    assert kept(folder) is None
    table = Table("r", "accuracy", [Line("ours", 0.9, 0.0, 0.0, 0.0, 1.0, 100, "3 of 4 kernels")], ["note"])
    keep(table, folder)
    clear_others(folder, "first")
    assert kept(folder) == table
    clear_others(folder, "second")
    assert kept(folder) is None


def test_again_without_tables_names_the_recipes_and_measures_nothing(bench: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="minilm-int8, whisper-int8") as caught:
        bench.main([bench.FOLDER / f"{name}.yaml" for name in ("minilm-int8", "whisper-int8")], tmp_path, 1, True, None)
    assert "--minutes 0" in str(caught.value) and not any(tmp_path.iterdir())


def test_every_recipe_of_the_contest_makes_integers(bench: Any) -> None:
    kinds = {path.stem: {stage.kind for stage in read_recipe(path).stages} for path in bench.RECIPES}
    assert len(kinds) == len(bench.RECIPES) and all(
        stage_kinds & {"onnx_int8", "qat"} for stage_kinds in kinds.values()
    )


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
