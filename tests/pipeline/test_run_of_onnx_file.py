"""Tests of complete runs that start from an ONNX file, with and without a config and processor beside it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import foreign_graphs
import numpy as np
import onnx
import pytest
import tiny_run
import yaml
from recurrent_graph import recurrent

import compress
from compress.pipeline.artifact import find_artifact
from compress.pipeline.keys import CachedStages
from compress.pipeline.planning import make_plan
from compress.pipeline.run import run
from compress.recipe.loading import read_recipe
from compress.report.console import closing_line
from compress.report.pages import html_page
from compress.results.report import Report
from compress.utils.errors import InputError, RecipeError, StageError
from compress.utils.progress import SilentProgress

pytestmark = pytest.mark.slow

STATIC = {"onnx_int8": {"method": "static", "calibration_examples": 8}}


def recipe_of(folder: Path, **fields: object) -> Path:
    """Write a recipe whose model is `theirs.onnx` in the same folder, and return its path."""
    values = {"name": "theirs", "model": "theirs.onnx", "benchmark": tiny_run.BENCHMARK, **fields}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    return folder / "recipe.yaml"


def value_of(report: Report, metric: str, model: str = "final", target: str = "cpu") -> float:
    return next(
        row.value for row in report.measurements if (row.metric, row.model, row.target) == (metric, model, target)
    )


def test_graph_without_task_is_compared_with_original(tmp_path: Path) -> None:
    foreign_graphs.write(foreign_graphs.classifier(11), tmp_path)
    draws = {"splits": {"train": "random:16", "test": "random:24"}}
    read = read_recipe(recipe_of(tmp_path, stages=[STATIC], data=draws, targets=["cpu", "ort"]))
    assert read.task == "graph-agreement" and read.task_is_inferred
    artifacts = tmp_path / "artifacts"
    plan = make_plan(read, tmp_path, CachedStages(read, tmp_path, artifacts), artifacts)
    assert (plan.sources[0].parameters, plan.stages[0].takes) == (8 * 27 + 4 * 8 + 5 * 512, "OnnxModel")
    done = run(read, tmp_path, artifacts, SilentProgress())
    assert value_of(done.report, "rms_error", "baseline") == 0.0
    assert 0 < value_of(done.report, "rms_error") < 0.05
    assert value_of(done.report, "rms_error", target="ort") == pytest.approx(
        value_of(done.report, "rms_error"), rel=0.2
    )
    assert value_of(done.report, "output_cosine") > 0.998
    assert any("not accuracy" in note and "drawn at random" in note for note in done.report.notes)
    assert {row.metric for row in done.report.measurements} >= {"latency_ms", "size_bytes", "speedup", "agreement"}
    quantized = onnx.load(done.folder / "model" / "onnx" / "model_quantized.onnx")
    assert {node.op_type for node in quantized.graph.node} >= {"QuantizeLinear", "DequantizeLinear"}
    assert CachedStages(read, tmp_path, artifacts)("onnx_int8")
    # The quantized graph can be opened as an artifact.
    assert len(find_artifact(done.folder, None).examples(SilentProgress())) == 24
    with pytest.raises(InputError, match="A model of graph-agreement has no metric of its own") as failure:
        compress.evaluate(done.folder)
    assert "compares it with the original" in str(failure.value)
    model = compress.load(done.folder / "model")
    (name,) = [entry.name for entry in quantized.graph.input]
    assert model.input_names == (name,)
    array = np.zeros((2, *[axis.dim_value for axis in quantized.graph.input[0].type.tensor_type.shape.dim[1:]]), "f4")
    (by_name,), (by_place,) = model.predict({name: array}), model.predict(array)
    assert by_name.keys() == by_place.keys() and all((by_name[key] == by_place[key]).all() for key in by_name)
    # No app reads the outputs of a graph without a task, so none is offered.
    for text in (closing_line(done.report, done.folder, "x"), (done.folder / "report.html").read_text()):
        assert "compress bundle" not in text
    report = done.report.model_copy(update={"task": "image-classification"})
    for text in (closing_line(report, done.folder, "x"), html_page(report)):
        assert "compress bundle" in text


def test_float16_graph_is_rejected_and_graph_with_branches_is_compressed(tmp_path: Path) -> None:
    foreign_graphs.write(foreign_graphs.classifier(half=True), tmp_path)
    draws = {"splits": {"train": "random:8", "test": "random:8"}}
    with pytest.raises(StageError, match="stored in float16"):
        run(read_recipe(recipe_of(tmp_path, stages=[STATIC], data=draws)), tmp_path, tmp_path / "a", SilentProgress())
    foreign_graphs.write(foreign_graphs.branching(), tmp_path)
    for stage in ("onnx_int8", "cast"):
        read = read_recipe(recipe_of(tmp_path, stages=[stage], data=draws))
        done = run(read, tmp_path, tmp_path / "a", SilentProgress())
        assert 0 < value_of(done.report, "rms_error") < 0.03
        (file,) = (done.folder / "model" / "onnx").glob("*.onnx")
        assert "If" in [node.op_type for node in onnx.load(file).graph.node]


@pytest.mark.parametrize("ceiling", [{}, {"error_ceiling": 0.05}])
def test_lstm_graph_is_quantized_with_and_without_error_ceiling(tmp_path: Path, ceiling: object) -> None:
    foreign_graphs.write(recurrent(in_pieces=False)[0], tmp_path)
    draws = {"splits": {"train": "random:8", "test": "random:8"}}
    read = read_recipe(recipe_of(tmp_path, stages=[{"onnx_int8": ceiling}], data=draws))
    done = run(read, tmp_path, tmp_path / "a", SilentProgress())
    assert 0 < value_of(done.report, "rms_error") < 0.05
    quantized = onnx.load(done.folder / "model" / "onnx" / "model_quantized.onnx")
    assert "DynamicQuantizeLSTM" in {node.op_type for node in quantized.graph.node}


def test_folder_of_npz_files_replaces_random_inputs(tmp_path: Path) -> None:
    foreign_graphs.write(foreign_graphs.embedding(), tmp_path)
    random = np.random.default_rng(0)
    for split, count in (("train", 4), ("test", 5)):
        (tmp_path / split).mkdir()
        for number in range(count):
            ids = random.integers(0, 40, (1, 4 + number))
            np.savez(tmp_path / split / f"{number}.npz", ids=ids, attention_mask=np.ones_like(ids))
    read = read_recipe(
        recipe_of(tmp_path, stages=["onnx_int8"], data={"source": ".", "splits": {"train": "train", "test": "test"}})
    )
    done = run(read, tmp_path, tmp_path / "artifacts", SilentProgress())
    assert 0 < value_of(done.report, "rms_error") < 0.05
    assert not any("at random" in note for note in done.report.notes)


def test_graph_with_processor_is_evaluated_on_its_task(tmp_path: Path) -> None:
    """The expected baseline accuracy is that of the run that exported the graph."""
    home = tmp_path / "home"
    home.mkdir()
    exported = run(
        tiny_run.load(tiny_run.write_all(home, stages=["onnx"], baseline="start")),
        home,
        tmp_path / "a",
        SilentProgress(),
    )
    copied = tmp_path / "handed"
    shutil.copytree(exported.folder / "model", copied)
    for split in ("train", "validation", "test"):
        shutil.copy(home / f"{split}.csv", tmp_path)
    values = yaml.safe_load((home / "tiny.yaml").read_text())
    values |= {"model": "handed/onnx/model.onnx", "stages": ["onnx_int8"]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    read = read_recipe(tmp_path / "recipe.yaml")
    done = run(read, tmp_path, tmp_path / "b", SilentProgress())
    assert value_of(done.report, "accuracy", "baseline") == value_of(exported.report, "accuracy")
    assert value_of(done.report, "agreement") > 0.9
    (copied / "tokenizer.json").unlink()
    for name in ("tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
        (copied / name).unlink(missing_ok=True)
    with pytest.raises(InputError, match="has no config and processor for its inputs"):
        make_plan(read, tmp_path, None, tmp_path / "b")


def test_unsupported_graphs_and_stages_are_rejected_by_plan(tmp_path: Path) -> None:
    foreign_graphs.write(foreign_graphs.classifier(), tmp_path)
    with pytest.raises(RecipeError, match="finetune, which takes a TorchModel, after the starting model"):
        read_recipe(recipe_of(tmp_path, stages=["finetune", "onnx"]))
    with pytest.raises(RecipeError, match="nothing: it does not apply to graph-agreement"):
        read_recipe(recipe_of(tmp_path, stages=[{"onnx_int8": {"accuracy_floor": 0.9}}]))
    quantized = foreign_graphs.model(
        [onnx.helper.make_node("DynamicQuantizeLinear", ["x"], ["y", "scale", "zero"])],
        [foreign_graphs.value("x", [1, 4])], [foreign_graphs.value("scale", [])],
    )  # fmt: skip
    foreign_graphs.write(quantized, tmp_path)
    read = read_recipe(recipe_of(tmp_path, stages=["onnx_int8"]))
    with pytest.raises(InputError, match="quantized already: it has the operator DynamicQuantizeLinear"):
        make_plan(read, tmp_path, None, tmp_path / "artifacts")
    (tmp_path / "theirs.onnx").write_bytes(b"\x08\x07")
    with pytest.raises(InputError, match="Not a whole ONNX file"):
        make_plan(read, tmp_path, None, tmp_path / "artifacts")
    assert json.dumps(read.model_dump(mode="json")["data"])
