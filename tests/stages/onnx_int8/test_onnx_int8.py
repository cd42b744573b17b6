"""The stage `onnx_int8` with calibration and a floor: what it records, says and refuses."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
import tiny
from exports import exported
from onnx import TensorProto

from compress.data.dataset import Dataset
from compress.formats.onnx.int8.dynamic import DynamicQuantizer
from compress.formats.onnx.model import FLOAT_GRAPH, QUANTIZED_GRAPH, OnnxModel
from compress.numerics.sampling import spread_sample
from compress.stages.onnx_int8.quantizer import LAYERS, METADATA, OneByOne
from compress.stages.onnx_int8.stage import OnnxInt8
from compress.utils.errors import DataError, StageError


def model() -> OnnxModel:
    exported_model = exported()
    return OnnxModel(exported_model.graph(), FLOAT_GRAPH, exported_model.model.companions())


def metadata(found: OnnxModel) -> dict[str, dict[str, object]]:
    entries = (entry for entry in found.graph.metadata_props if entry.key.startswith("compress."))
    return {entry.key: json.loads(entry.value) for entry in entries}


def test_what_it_was_calibrated_on_is_recorded_in_the_file():
    context = tiny.context(tiny.dataset(train=64))
    quantized = OnnxInt8(method="static", calibration_examples=10).run(model(), context)
    assert quantized.file_name == QUANTIZED_GRAPH
    record = metadata(quantized)[METADATA]
    examples = context.encode("train", exported().model)
    assert examples.labels is not None
    rows = spread_sample(examples.lengths(), examples.labels, 10, context.seed)
    assert record == {
        **{"split": "train", "examples": 10, "labels": 2, "seed": 0},
        "rows_sha256": hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest(),
    }
    assert np.bincount(examples.labels[rows]).tolist() == [5, 5]


def test_another_seed_calibrates_on_others():
    data = tiny.dataset(train=64)
    first, second = (
        metadata(OnnxInt8(method="static", calibration_examples=4).run(model(), tiny.context(data, seed=seed)))[
            METADATA
        ]
        for seed in (0, 1)
    )
    assert first["rows_sha256"] != second["rows_sha256"]


def test_feeds_are_the_examples_unpadded():
    examples = exported().examples
    feeds = OneByOne(examples, np.array([3, 1, 7]))
    assert len(feeds) == 3
    for feed, row in zip(feeds, (3, 1, 7), strict=True):
        np.testing.assert_array_equal(feed["input_ids"], examples.inputs[row]["input_ids"][None])
        assert feed["attention_mask"].all()


@pytest.mark.parametrize("method", ["static", "dynamic"])
def test_a_floor_is_held_and_each_layers_damage_is_recorded(method: str):
    context = tiny.context(tiny.dataset(train=64, validation=200))
    static = {"calibration_examples": 8} if method == "static" else {}
    stage = OnnxInt8(method=method, accuracy_floor=0.98, damage_examples=8, **static)  # type: ignore[arg-type]
    damage = metadata(stage.run(model(), context))[LAYERS]
    assert damage["metric"] >= damage["floor"] == pytest.approx(0.98 * damage["float_metric"])  # type: ignore[operator]
    assert damage["evaluations"] <= 6  # type: ignore[operator]
    layers: list[dict[str, object]] = damage["layers"]  # type: ignore[assignment]
    float_layers = [layer for layer in layers if not layer["int8"]]
    assert len(layers) in (0, 9) and layers[: len(float_layers)] == float_layers
    assert [row[0] for table in context.tables for row in table.rows] == [layer["layer"] for layer in layers]


def test_layers_that_the_recipe_names_stay_in_float():
    context = tiny.context(tiny.dataset(train=16))
    layers = DynamicQuantizer(model().graph).layers
    quantized = OnnxInt8(keep=(f"*{layers[2].weight[1:]}",)).run(model(), context)
    left = {tensor.name for tensor in quantized.graph.graph.initializer if tensor.data_type == TensorProto.FLOAT}
    assert [layer.name for layer in layers if layer.weight in left] == [layers[2].name]
    with pytest.raises(StageError, match=r"fits '\*layer\.9\*'"):
        OnnxInt8(keep=("*layer.9*",)).run(model(), context)
    with pytest.raises(StageError, match="Every layer"):
        OnnxInt8(keep=("*",)).run(model(), context)


@pytest.mark.parametrize(
    ("fields", "needed"),
    [
        ({"smooth_quant": 0.5}, "method: static"),
        ({"search_seconds": 1}, "accuracy_floor or error_ceiling"),
        ({"method": "static", "percentile": 99}, "calibration_method: percentile"),
        ({"method": "static", "statistics": "nncf", "types": "s8s8"}, "statistics: own"),
    ],
)
def test_fields_without_an_effect_are_refused(fields, needed):
    with pytest.raises(ValueError, match=needed):
        OnnxInt8(**fields)


def test_nncf_is_called_only_where_it_finds_the_ranges():
    assert "nncf" in OnnxInt8(method="static", statistics="nncf").called_packages()
    assert "nncf" not in OnnxInt8(method="static").called_packages()
    assert OnnxInt8().called_packages() == ("onnx", "onnx_ir", "onnxruntime")
    assert OnnxInt8().needs().splits == () and OnnxInt8(method="static").needs().splits == ("train",)
    assert OnnxInt8(accuracy_floor=0.9).needs().splits == ("train", "validation")


def test_an_empty_split_and_a_quantized_model_are_refused():
    data = tiny.dataset(train=64)
    empty = Dataset(data.columns, {**data.tables, "train": data.split("train").slice(0, 0)}, data.labels)
    with pytest.raises(DataError, match="train split is empty"):
        OnnxInt8(method="static").run(model(), replace(tiny.context(), data=empty))
    once = OnnxInt8().run(model(), tiny.context())
    with pytest.raises(StageError, match="quantized already"):
        OnnxInt8().run(once, tiny.context())
