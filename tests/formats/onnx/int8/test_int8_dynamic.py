"""INT8 graphs: tables look up exactly what their integers stand for, weights are int8, answers stay close."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import tiny
from exports import batch, exported, run
from onnx import TensorProto, helper, numpy_helper

from compress.formats.onnx.int8 import dynamic as subject
from compress.formats.onnx.int8.dynamic import quantize_embeddings, quantize_products
from compress.formats.onnx.model import FLOAT_GRAPH, OnnxModel
from compress.numerics.block_quantization import quantize_blocks
from compress.stages.onnx_int8.stage import OnnxInt8
from compress.utils.errors import StageError

ROWS = 11


def table(width: int) -> np.ndarray:
    return np.random.default_rng(0).standard_t(4, (ROWS, width)).astype(np.float32)


def lookup(width: int, axis: int = 0, tied: bool = False, twice: bool = False) -> onnx.ModelProto:
    nodes = [helper.make_node("Gather", ["table", "ids"], ["y"], axis=axis, name="look_up")]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    if tied:
        nodes += [
            helper.make_node("Transpose", ["table"], ["turned"], perm=[1, 0]),
            helper.make_node("MatMul", ["y", "turned"], ["z"]),
        ]
        outputs.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, None))
    if twice:
        nodes.append(helper.make_node("Gather", ["table", "zero"], ["first"]))
        outputs.append(helper.make_tensor_value_info("first", TensorProto.FLOAT, None))
    arrays = [numpy_helper.from_array(table(width), "table"), numpy_helper.from_array(np.array([0]), "zero")]
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "length"])
    graph = helper.make_graph(nodes, "lookup", [ids], outputs, arrays[: 2 if twice else 1])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


IDS = np.array([[0, 3, ROWS - 1], [7, 7, 1]])


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    ("width", "blocks"),
    [(16, (16, 16)), (32, (32, 32)), (96, (32, 32)), (160, (32, 32)), (48, (16, 16)), (256, (128, 32))],
)
def test_a_look_up_gives_what_the_integers_stand_for(bits: int, width: int, blocks: tuple[int, int]):
    model = lookup(width)
    assert quantize_embeddings(model, bits) == ["table"]
    expected = quantize_blocks(table(width), bits, blocks[0 if bits == 8 else 1]).dequantize()[IDS]
    assert (run(model, ids=IDS) == expected).all()
    assert "table" not in {tensor.name for tensor in model.graph.initializer}
    stored = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    assert stored < table(width).nbytes * (0.6 if bits == 8 else 0.5)


@pytest.mark.parametrize("largest", [16, 32, 64])
def test_the_block_size_can_be_chosen(largest: int):
    model = lookup(64)
    quantize_embeddings(model, 8, largest)
    expected = quantize_blocks(table(64), 8, largest).dequantize()[IDS]
    assert (run(model, ids=IDS) == expected).all()


def test_two_look_ups_share_a_table():
    model = lookup(32, twice=True)
    assert quantize_embeddings(model, 8) == ["table"]
    assert Counter(node.op_type for node in model.graph.node) == {"GatherBlockQuantized": 2}
    assert len(model.graph.initializer) == 4


@pytest.mark.parametrize(
    "model",
    [lookup(20), lookup(8), lookup(24), lookup(32, axis=1), lookup(32, tied=True)],
    ids=["width 20", "width 8", "width 24", "along columns", "also a product"],
)
def test_tables_that_cannot_be_quantized_are_left_alone(model: onnx.ModelProto):
    original = model.SerializeToString()
    assert quantize_embeddings(model, 8) == [] and model.SerializeToString() == original


def rows_of(graph: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.graph.initializer}


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("reduce_range", [True, False])
def test_products_have_int8_weights(per_channel: bool, reduce_range: bool):
    encoder = exported()
    quantized = quantize_products(encoder.graph(), per_channel, reduce_range)
    operators = Counter(node.op_type for node in quantized.graph.node)
    # Four matrices a layer: packed attention, its output, two of the feed-forward; then the pooler and the head.
    assert operators["QAttention"] == tiny.LAYERS and operators["MatMulInteger"] == 3 * tiny.LAYERS + 2
    assert not operators["MatMul"] and not operators["Gemm"] and not operators["Attention"]
    arrays = rows_of(quantized)
    weights = {name: array for name, array in arrays.items() if array.dtype == np.int8 and array.ndim == 2}
    assert len(weights) == 4 * tiny.LAYERS + 2
    largest = max(abs(array.astype(int)).max() for array in weights.values())
    assert largest in ((63, 64) if reduce_range else (127, 128))
    for name, array in weights.items():
        scale = arrays[name.replace("_quantized", "_scale")]
        assert scale.shape == ((array.shape[1],) if per_channel else ())
    floats = [array.size for array in arrays.values() if array.dtype == np.float32 and array.ndim == 2]
    assert sorted(floats) == sorted([tiny.POSITIONS * tiny.WIDTH, encoder.model.module.config.vocab_size * tiny.WIDTH])


def test_weights_stand_for_what_they_were():
    encoder = exported()
    original, after = rows_of(encoder.graph()), rows_of(quantize_products(encoder.graph(), True, False))
    names = [name for name in original if f"{name}_quantized" in after and original[name].ndim == 2]
    assert len(names) >= 4 * tiny.LAYERS
    for name in names:
        scales = after[f"{name}_scale"]
        error = np.abs(after[f"{name}_quantized"] * scales - original[name])
        assert (error <= scales / 2 * 1.001).all() and error.max() > 0


@pytest.mark.parametrize("bits", [32, 8, 4])
@pytest.mark.full_range
def test_answers_stay_close(bits: int):
    encoder = exported()
    graph = encoder.graph()
    quantized = quantize_products(graph, True, False)
    if bits < 32:
        assert len(quantize_embeddings(quantized, bits)) == 2
    inputs = batch(8, 17, encoder.model.module.config.vocab_size, encoder.model.processor.pad_token_id)
    difference = np.abs(run(quantized, **inputs) - run(graph, **inputs))
    spread = run(graph, **inputs).std(axis=0).min()
    assert 0 < difference.max() < {32: 0.3, 8: 0.3, 4: 1.5}[bits] * spread
    assert quantized.ByteSize() < graph.ByteSize() * {32: 0.65, 8: 0.45, 4: 0.4}[bits]


def test_a_bias_before_a_gelu_goes_into_the_product(tmp_path: Path):
    """As ONNX Runtime's quantizer leaves it, it is added with the Gelu; the answers are the same to the last bit."""
    encoder = exported()
    graph = encoder.graph()
    assert sum(node.op_type == "BiasGelu" for node in graph.graph.node) == 2
    quantized = quantize_products(graph, True, False)
    optimized = tmp_path / "optimized.onnx"
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(optimized)
    onnxruntime.InferenceSession(quantized.SerializeToString(), options, providers=["CPUExecutionProvider"])
    nodes = onnx.load(optimized).graph.node
    producers = {output: node for node in nodes for output in node.output}
    products = [producers[node.input[0]] for node in nodes if node.op_type == "Gelu"]
    assert [node.op_type for node in products] == ["DynamicQuantizeMatMul"] * 2
    assert ["dense.bias" in node.input[4] for node in products] == [True] * 2
    inputs = batch(8, 17, encoder.model.module.config.vocab_size, encoder.model.processor.pad_token_id)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subject, "_give_biases_to_products", lambda graph: None)
        left = quantize_products(graph, True, False)
    assert left.SerializeToString() != quantized.SerializeToString()
    assert (run(left, **inputs) == run(quantized, **inputs)).all()


def test_the_input_graph_is_not_changed_by_quantizing_products():
    graph = exported().graph()
    original = graph.SerializeToString()
    quantize_products(graph, True, False)
    assert graph.SerializeToString() == original


def test_quantizing_gives_the_same_bytes_each_time():
    def bytes_of() -> bytes:
        quantized = quantize_products(exported().graph(), True, False)
        quantize_embeddings(quantized, 4)
        return quantized.SerializeToString()

    assert bytes_of() == bytes_of()


def test_a_graph_without_anything_to_quantize_is_refused():
    model = OnnxModel(lookup(20), FLOAT_GRAPH, {})
    with pytest.raises(StageError, match="nothing to quantize"):
        OnnxInt8().run(model, tiny.context())
