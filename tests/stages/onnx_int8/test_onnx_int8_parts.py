"""Stages that quantize a model of two graphs: the parts that are meant, and nothing else."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import tiny
from tiny_speech import TASK, write_recordings, write_speech
from tiny_whisper import FRAMES, write_tiny_whisper

from compress.data.config import DataConfig
from compress.data.dataset import load_dataset
from compress.formats.onnx.decoder import export_encoder_decoder, teacher_forced_logits
from compress.formats.onnx.model import OnnxModel
from compress.models.checkpoint import Checkpoint
from compress.models.processor import processor_of
from compress.stages.onnx_int8.stage import OnnxInt8
from compress.stages.onnx_weight_only import OnnxWeightOnly
from compress.tasks.registry import get_task
from compress.utils.errors import StageError
from compress.utils.progress import SilentProgress

ENCODER, DECODER = "encoder_model.onnx", "decoder_model_merged.onnx"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> OnnxModel:
    return export_encoder_decoder(Checkpoint(write_tiny_whisper(tmp_path_factory.mktemp("whisper"))))


def answers(model: OnnxModel, features: np.ndarray | None = None) -> np.ndarray:
    if features is None:
        features = np.random.default_rng(0).normal(size=(8, FRAMES)).astype(np.float32)
    return teacher_forced_logits(model, {"input_features": features}, np.array([256, 5, 99, 17]))


def operators(graph: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in ir.traversal.RecursiveGraphIterator(ir.from_proto(graph).graph))


def error(model: OnnxModel, other: OnnxModel) -> float:
    expected = answers(model)
    return float(np.abs(answers(other) - expected).std() / expected.std())


def test_dynamic_int8_reaches_every_product_and_stores_the_tied_table_once(model: OnnxModel):
    done = OnnxInt8().run(model, tiny.context())
    assert list(done.graphs) == ["encoder_model_quantized.onnx", "decoder_model_merged_quantized.onnx"]
    for graph in done.graphs.values():
        operator_counts = operators(graph)
        assert operator_counts["MatMul"] == 0 and operator_counts["MatMulInteger"] > 0
    decoder = done.graphs["decoder_model_merged_quantized.onnx"]
    large = [tensor for tensor in decoder.graph.initializer if np.prod(tensor.dims) == 258 * 64]
    assert [onnx.TensorProto.DataType.Name(tensor.data_type) for tensor in large] == ["UINT8"]
    assert error(model, done) < 0.2


def test_one_part_is_quantized_and_the_other_left_as_it_is(model: OnnxModel):
    encoder = OnnxInt8(part="encoder").run(model, tiny.context())
    assert list(encoder.graphs) == ["encoder_model_quantized.onnx", DECODER]
    assert encoder.graphs[DECODER] == model.graphs[DECODER]
    both = OnnxWeightOnly(part="decoder", bits=4).run(encoder, tiny.context())
    assert list(both.graphs) == ["encoder_model_quantized.onnx", "decoder_model_merged_q4.onnx"]
    assert operators(both.others["decoder_model_merged_q4.onnx"])["MatMulNBits"] == 2 * 10 + 1
    assert error(model, both) < 0.5


def test_a_part_that_is_quantized_already_is_refused(model: OnnxModel):
    once = OnnxWeightOnly(part="decoder").run(model, tiny.context())
    with pytest.raises(StageError, match="decoder"):
        OnnxWeightOnly(part="decoder").run(once, tiny.context())


def test_static_ranges_of_the_encoder_come_from_the_first_window_of_each_recording(model: OnnxModel, tmp_path: Path):
    files = write_speech(tmp_path)
    write_recordings(tmp_path, "long", 2, seed=5, seconds=(2.5, 3.5))
    task = get_task(TASK)
    config = DataConfig(source=str(tmp_path), splits={"train": "long.jsonl", "test": files["test"]})
    data = load_dataset(config, task.columns, tmp_path, SilentProgress())
    context = dataclasses.replace(tiny.context(), task=task, data=data)
    done = OnnxInt8(part="encoder", method="static", embedding_bits=32).run(model, context)
    assert list(done.graphs) == ["encoder_model_quantized.onnx", DECODER]
    assert operators(done.graphs["encoder_model_quantized.onnx"])["MatMulIntegerToFloat"] > 0
    (heard, *_) = task.encode(data.split("train"), processor_of(model), None, 24).inputs
    features = heard["input_features"]
    assert features.shape[-1] > FRAMES
    # The window that ranges were found on, not noise beyond them.
    expected, quantized_answers = (answers(candidate, features[:, :FRAMES]) for candidate in (model, done))
    assert np.abs(quantized_answers - expected).std() / expected.std() < 0.2


def test_static_ranges_of_a_decoder_are_refused_with_what_to_do(model: OnnxModel):
    with pytest.raises(StageError, match="encoders alone"):
        OnnxInt8(method="static").run(model, tiny.context())
