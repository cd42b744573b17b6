"""Tests of `onnx_int8` with calibration and an accuracy floor: recorded metadata, notes and refused settings."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import sentences
import tiny
from exports import exported
from onnx import TensorProto, helper, numpy_helper
from onnx_graphs import onnx_model
from pydantic import ValidationError
from tiny_speech import TASK, write_recordings, write_speech
from tiny_whisper import FRAMES, write_tiny_whisper

from compress.data.config import DataConfig
from compress.data.dataset import Dataset, load_dataset
from compress.formats.onnx.decoder import export_encoder_decoder, teacher_forced_logits
from compress.formats.onnx.int8.dynamic import DynamicQuantizer
from compress.formats.onnx.int8.observers import open_session
from compress.formats.onnx.int8.select_nodes import QuantizableLayer
from compress.formats.onnx.int8.settings import Int8Options
from compress.formats.onnx.int8.static import StaticQuantizer
from compress.formats.onnx.model import FLOAT_GRAPH, QUANTIZED_GRAPH, OnnxModel
from compress.models.checkpoint import Checkpoint
from compress.models.processor import processor_of
from compress.numerics.sampling import spread_sample
from compress.stages.onnx_int8.accuracy_aware import Damage, FallbackSearch, agreement_with, merit_of, rank, search
from compress.stages.onnx_int8.quantizer import LAYERS, METADATA, OneByOne, calibration_set
from compress.stages.onnx_int8.stage import OnnxInt8
from compress.stages.onnx_weight_only import OnnxWeightOnly
from compress.tasks.registry import TASKS
from compress.utils.errors import DataError, StageError
from compress.utils.progress import SilentProgress


def model() -> OnnxModel:
    exported_model = exported()
    return OnnxModel(exported_model.graph(), FLOAT_GRAPH, exported_model.model.companions())


def metadata(found: OnnxModel) -> dict[str, dict[str, object]]:
    entries = (entry for entry in found.graph.metadata_props if entry.key.startswith("compress."))
    return {entry.key: json.loads(entry.value) for entry in entries}


def test_calibration_data_is_recorded_in_the_file():
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


def test_calibration_feeds_are_unpadded_examples():
    examples = exported().examples
    feeds = OneByOne(examples, np.array([3, 1, 7]), {})
    assert len(feeds) == 3
    for feed, row in zip(feeds, (3, 1, 7), strict=True):
        np.testing.assert_array_equal(feed["input_ids"], examples.inputs[row]["input_ids"][None])
        assert feed["attention_mask"].all()


@pytest.mark.parametrize("method", ["static", "dynamic"])
def test_accuracy_floor_is_held_and_layer_damage_is_recorded(method: str):
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


def test_layers_named_in_the_recipe_stay_float():
    context = tiny.context(tiny.dataset(train=16))
    layers = DynamicQuantizer(model().graph).layers
    quantized = OnnxInt8(keep=(f"*{layers[2].weight[1:]}",)).run(model(), context)
    left = {tensor.name for tensor in quantized.graph.graph.initializer if tensor.data_type == TensorProto.FLOAT}
    assert [layer.name for layer in layers if layer.weight in left] == [layers[2].name]
    with pytest.raises(StageError, match=r"fits '\*layer\.9\*'"):
        OnnxInt8(keep=("*layer.9*",)).run(model(), context)
    with pytest.raises(StageError, match="Every layer"):
        OnnxInt8(keep=("*",)).run(model(), context)


def test_float_layers_that_cost_most_of_the_file_are_named():
    layers = [
        QuantizableLayer(name, "MatMul", f"{name}.weight", size, -1) for name, size in (("a", 10), ("b", 60), ("c", 30))
    ]
    damages = tuple(Damage(layer, 0.1) for layer in layers)
    outcome = FallbackSearch(onnx.ModelProto(), damages, ("a", "b"), 0.95, 0.96, 1.0, 3, by_error=True)
    note = outcome.size_note()
    assert note is not None and "hold 70% of the weights, b alone 60%; a higher error_ceiling" in note
    assert "a lower accuracy_floor" in str(replace(outcome, by_error=False).size_note())
    assert replace(outcome, kept=("a",)).size_note() is None and replace(outcome, kept=()).size_note() is None


@pytest.mark.parametrize(
    ("fields", "needed"),
    [
        ({"weight_rounding": "feedback"}, "method: static"),
        ({"damage_examples": 1}, "accuracy_floor or error_ceiling"),
        ({"method": "static", "statistics": "nncf", "weight_rounding": "feedback"}, "statistics: own"),
    ],
)
def test_fields_without_an_effect_are_refused(fields, needed):
    with pytest.raises(ValueError, match=needed):
        OnnxInt8(**fields)


def test_nncf_is_required_only_for_nncf_statistics():
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


DECODER = "decoder_model_merged.onnx"


@pytest.fixture(scope="module")
def speech_model(tmp_path_factory: pytest.TempPathFactory) -> OnnxModel:
    return export_encoder_decoder(Checkpoint(write_tiny_whisper(tmp_path_factory.mktemp("whisper"))))


def answers(speech_model: OnnxModel, features: np.ndarray | None = None) -> np.ndarray:
    if features is None:
        features = np.random.default_rng(0).normal(size=(8, FRAMES)).astype(np.float32)
    return teacher_forced_logits(speech_model, {"input_features": features}, np.array([256, 5, 99, 17]))


def operators(graph: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in ir.traversal.RecursiveGraphIterator(ir.from_proto(graph).graph))


def error(speech_model: OnnxModel, other: OnnxModel) -> float:
    expected = answers(speech_model)
    return float(np.abs(answers(other) - expected).std() / expected.std())


def test_dynamic_int8_covers_all_matmuls_and_stores_tied_table_once(speech_model: OnnxModel):
    done = OnnxInt8().run(speech_model, tiny.context())
    assert list(done.graphs) == ["encoder_model_quantized.onnx", "decoder_model_merged_quantized.onnx"]
    for graph in done.graphs.values():
        operator_counts = operators(graph)
        assert operator_counts["MatMul"] == 0 and operator_counts["MatMulInteger"] > 0
    decoder = done.graphs["decoder_model_merged_quantized.onnx"]
    large = [tensor for tensor in decoder.graph.initializer if np.prod(tensor.dims) == 258 * 64]
    assert [onnx.TensorProto.DataType.Name(tensor.data_type) for tensor in large] == ["UINT8"]
    assert error(speech_model, done) < 0.2


def test_one_part_is_quantized_and_the_other_unchanged(speech_model: OnnxModel):
    encoder = OnnxInt8(part="encoder").run(speech_model, tiny.context())
    assert list(encoder.graphs) == ["encoder_model_quantized.onnx", DECODER]
    assert encoder.graphs[DECODER] == speech_model.graphs[DECODER]
    both = OnnxWeightOnly(part="decoder", bits=4).run(encoder, tiny.context())
    assert list(both.graphs) == ["encoder_model_quantized.onnx", "decoder_model_merged_q4.onnx"]
    assert operators(both.others["decoder_model_merged_q4.onnx"])["MatMulNBits"] == 2 * 10 + 1
    assert error(speech_model, both) < 0.5


def test_already_quantized_part_is_refused(speech_model: OnnxModel):
    once = OnnxWeightOnly(part="decoder").run(speech_model, tiny.context())
    with pytest.raises(StageError, match="decoder"):
        OnnxWeightOnly(part="decoder").run(once, tiny.context())


def test_static_encoder_ranges_use_first_window_of_each_recording(speech_model: OnnxModel, tmp_path: Path):
    files = write_speech(tmp_path)
    write_recordings(tmp_path, "long", 2, seed=5, seconds=(2.5, 3.5))
    task = TASKS[TASK]
    config = DataConfig(source=str(tmp_path), splits={"train": "long.jsonl", "test": files["test"]})
    data = load_dataset(config, task.columns, tmp_path, SilentProgress())
    context = dataclasses.replace(tiny.context(), task=task, data=data)
    done = OnnxInt8(part="encoder", method="static", embedding_bits=32).run(speech_model, context)
    assert list(done.graphs) == ["encoder_model_quantized.onnx", DECODER]
    assert operators(done.graphs["encoder_model_quantized.onnx"])["MatMulIntegerToFloat"] > 0
    (heard, *_) = task.encode(data.split("train"), processor_of(speech_model), None, 24).inputs
    features = heard["input_features"]
    assert features.shape[-1] > FRAMES
    # The window that was used for calibration, not noise outside the ranges.
    expected, quantized_answers = (answers(candidate, features[:, :FRAMES]) for candidate in (speech_model, done))
    assert np.abs(quantized_answers - expected).std() / expected.std() < 0.2


def test_static_decoder_ranges_are_refused_with_advice(speech_model: OnnxModel):
    with pytest.raises(StageError, match="encoders alone"):
        OnnxInt8(method="static").run(speech_model, tiny.context())


INNER, LAYER_COUNT, BAD = 32, 26, (3, 9, 16)


def network() -> onnx.ModelProto:
    """Return a chain of matrix products; those in `BAD` have an input channel that spoils a shared range."""
    generator = np.random.default_rng(0)
    nodes, arrays, previous = [], {}, "x"
    for layer in range(LAYER_COUNT):
        weight = np.linalg.qr(generator.normal(size=(INNER, INNER)))[0].astype(np.float32)
        if layer in BAD:
            # One huge channel out of a bias, which the product after it ignores.
            weight[5] = 0
        arrays[f"w{layer}"] = weight
        shift = np.zeros(INNER, np.float32)
        if layer + 1 in BAD:
            shift[5] = 4000
        arrays[f"b{layer}"] = shift
        nodes.append(helper.make_node("MatMul", [previous, f"w{layer}"], [f"p{layer}"], name=f"layer_{layer}"))
        nodes.append(helper.make_node("Add", [f"p{layer}", f"b{layer}"], [f"y{layer}"], name=f"add_{layer}"))
        previous = f"y{layer}"
    return onnx_model(nodes, {"x": ["rows", INNER]}, {previous: ["rows", INNER]}, arrays)


def feeds() -> list[dict[str, np.ndarray]]:
    return [{"x": np.random.default_rng(1).normal(size=(64, INNER)).astype(np.float32)}]


class Counted:
    """Agreement of argmax with the float graph, counting the evaluations."""

    def __init__(self) -> None:
        self.asked = 0
        self._x = np.random.default_rng(2).normal(size=(400, INNER)).astype(np.float32)
        self._expected = self._answers(network())

    def _answers(self, graph: onnx.ModelProto) -> np.ndarray:
        import onnxruntime

        answers: np.ndarray = onnxruntime.InferenceSession(graph.SerializeToString()).run(None, {"x": self._x})[0]
        return answers.argmax(axis=-1)

    def __call__(self, graph: onnx.ModelProto) -> float:
        self.asked += 1
        return float((self._answers(graph) == self._expected).mean())


def quantizer() -> StaticQuantizer:
    return StaticQuantizer(network(), feeds(), Int8Options(method="static", reduce_range=False, bias_correction=False))


@pytest.mark.full_range
def test_worst_layers_are_restored_to_float():
    merit = Counted()
    outcome = search(network(), quantizer(), merit, 0.9, feeds(), SilentProgress())
    # A search one layer at a time would evaluate 77 graphs until its third round ends.
    assert outcome.evaluations + 1 == merit.asked <= 7
    assert set(outcome.kept) == {f"layer_{layer}" for layer in BAD}
    assert outcome.merit >= 0.9 and outcome.merit == merit(outcome.graph)
    assert [damage.layer.name for damage in outcome.damages[:3]] == sorted(outcome.kept, key=list(outcome.kept).index)
    assert outcome.damages[2].error > 10 * outcome.damages[3].error
    operators = [node.op_type for node in outcome.graph.graph.node]
    assert operators.count("MatMul") == 3 and operators.count("MatMulIntegerToFloat") == LAYER_COUNT - 3
    rows = outcome.rows()
    assert [row[-1] for row in rows] == ["kept in float"] * 3 + ["int8"] * (LAYER_COUNT - 3)
    assert {row[0] for row in rows[:3]} == set(outcome.kept) and {row[3] for row in rows} == {3 * INNER * INNER}
    assert "3 of 26 layers in float" in outcome.verdict()


def test_floor_that_holds_at_once_needs_one_evaluation():
    merit = Counted()
    outcome = search(network(), quantizer(), merit, 0.01, feeds(), SilentProgress())
    assert merit.asked == 2 and outcome.kept == () and outcome.damages == ()


@pytest.mark.full_range
def test_error_ceiling_needs_no_metric():
    layer_quantizer, asked = quantizer(), feeds()
    merit = agreement_with(network(), asked)
    both = (network(), layer_quantizer.quantize())
    float_answers, int8_answers = (open_session(graph).run(None, asked[0])[0].astype(float) for graph in both)
    error = np.sqrt(np.square(int8_answers - float_answers).mean()) / float_answers.std()
    assert merit(layer_quantizer.quantize()) == pytest.approx(1 - error) and error > 0.5
    outcome = search(network(), layer_quantizer, merit, 0.95, asked, SilentProgress(), by_error=True)
    assert set(outcome.kept) == {f"layer_{layer}" for layer in BAD} and outcome.merit >= 0.95
    assert f"RMS error {1 - outcome.merit:.4f} on training examples (at most 0.0500)" in outcome.verdict()


def test_error_is_defined_for_scalar_outputs():
    graph = network()
    graph.graph.node.append(onnx.helper.make_node("ReduceMean", [graph.graph.output[0].name], ["mean"], keepdims=0))
    graph.graph.output.append(onnx.helper.make_tensor_value_info("mean", onnx.TensorProto.FLOAT, []))
    assert agreement_with(graph, feeds())(graph) == 1.0


def test_floor_and_ceiling_together_are_refused():
    with pytest.raises(ValidationError, match="accuracy_floor or error_ceiling, not both"):
        OnnxInt8(accuracy_floor=0.9, error_ceiling=0.1)
    assert OnnxInt8(error_ceiling=0.1).needs().splits == ("train",)
    assert OnnxInt8(error_ceiling=0.1, damage_examples=8).damage_examples == 8


class Spoiling:
    """A quantizer whose every quantized layer ruins the output."""

    def __init__(self) -> None:
        self.layers = [QuantizableLayer(name, "MatMul", name, 1, -1) for name in ("layer_0", "layer_1")]

    def quantize(self, kept: Collection[str] = ()) -> onnx.ModelProto:
        graph = network()
        for tensor in graph.graph.initializer:
            if tensor.name in ("w0", "w1") and f"layer_{tensor.name[1]}" not in kept:
                tensor.CopyFrom(numpy_helper.from_array(np.zeros((INNER, INNER), np.float32), tensor.name))
        return graph


def test_unreachable_accuracy_floor_is_an_error():
    with pytest.raises(StageError, match=r"No 8-bit layer keeps the metric at 99\.0%"):
        search(network(), Spoiling(), Counted(), 0.99, feeds(), SilentProgress())


def test_damage_is_squared_output_change_over_variance():
    ranked = rank(network(), Spoiling(), feeds(), SilentProgress())
    x = feeds()[0]["x"].astype(np.float64)
    arrays = {t.name: numpy_helper.to_array(t).astype(np.float64) for t in network().graph.initializer}

    def output(gone: int | None) -> np.ndarray:
        y = x
        for layer in range(LAYER_COUNT):
            y = (0 if layer == gone else y @ arrays[f"w{layer}"]) + arrays[f"b{layer}"]
        return np.broadcast_to(y, (len(x), INNER))

    expected = output(None)
    for damage in ranked:
        change = output(int(damage.layer.name[-1])) - expected
        assert damage.error == pytest.approx(
            np.square(change).sum() / np.square(expected - expected.mean(0)).sum(), rel=1e-3
        )


EMBEDDING_TASK = TASKS[sentences.TASK]


def lookup(table: np.ndarray) -> onnx.ModelProto:
    """Return a graph whose token embeddings are the rows of ``table``."""
    axes = ["batch_size", "sequence_length"]
    nodes = [helper.make_node("Gather", ["table", "input_ids"], ["last_hidden_state"])]
    ends = {"input_ids": (TensorProto.INT64, axes)}, {"last_hidden_state": [*axes, table.shape[1]]}
    return onnx_model(nodes, *ends, {"table": table}, opset=17)


def test_merit_of_embeddings_is_recall_at_10() -> None:
    model = sentences.encoder()
    table = np.random.default_rng(0).normal(size=(len(model.tokenizer), sentences.WIDTH)).astype(np.float32)
    # Pairs that have little to do with their texts, so that recall is low.
    rows = sentences.pairs(60).set_column(1, "pair", sentences.pairs(60, seed=5)["pair"])
    examples = EMBEDDING_TASK.encode(rows, model.processor, None, 24)
    assert len(set(examples.lengths().tolist())) > 3
    embeddings = np.stack([table[one["input_ids"]].mean(axis=0) for one in examples.inputs])
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    scores = embeddings[:60] @ embeddings[60:].T
    expected = np.mean((scores >= scores.diagonal()[:, None]).sum(axis=1) <= 10)
    assert 0.05 < expected < 0.8
    assert merit_of(EMBEDDING_TASK, examples)(lookup(table)) == expected


def test_pairs_are_not_used_as_classes_for_calibration_sampling() -> None:
    model, context = sentences.encoder(), sentences.context()
    graph = lookup(np.ones((len(model.tokenizer), sentences.WIDTH), np.float32))
    chosen = calibration_set(OnnxModel(graph, FLOAT_GRAPH, model.companions()), context, 12)
    assert (len(chosen.feeds), chosen.labels) == (12, 0)
