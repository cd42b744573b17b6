"""Few-bit weights that become float when the graph is opened: same answers, few bits on disk, floats in memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from quantized import save_tiny_llama
from transformers import MixtralConfig
from written_decoders import CONFIGS, FewBitsCheckpoint, Graph, by_transformers, logits_of, random_ids, save_decoder

from compress.formats.onnx.decoder import GraphSettings, export_decoder
from compress.formats.onnx.decoder.graph_builder import GraphBuilder
from compress.formats.onnx.decoder.stored_weight import StoredWeight, expand_weight, multiply_expanded, store
from compress.numerics.integer_grid import QuantizedWeight
from compress.utils.errors import ModelError

EXACT = {"atol": 2e-4, "rtol": 1e-4}
EXPANDED = GraphSettings(expand_on_load=True)


def few_bits(place: Path, name: str, bits: int = 4) -> FewBitsCheckpoint:
    """Every matrix of a tiny decoder in so many bits."""
    modules = ("_proj", "embed_tokens", "lm_head")
    return FewBitsCheckpoint(save_decoder(place, CONFIGS[name]).folder, tuple((module, bits) for module in modules))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", ["llama", "llama with biases", "mistral", "qwen2", "qwen3"])
def test_a_prompt_and_single_tokens_equal_torch(name: str, bits: int, tmp_path: Path) -> None:
    few, ids = few_bits(tmp_path, name, bits), random_ids(2, 17)
    expected = logits_of(by_transformers(few, few), ids)
    exported = export_decoder(few, EXPANDED)
    assert exported.file_name == "model_q4.onnx"
    assert "MatMulNBits" not in {node.op_type for node in exported.graph.graph.node}
    graph = Graph(exported.graph)
    logits, past = graph.run(ids[:, :7])
    np.testing.assert_allclose(logits, expected[:, :7], **EXACT)
    for position in range(7, 17):
        logits, past = graph.run(ids[:, position : position + 1], past=past)
        np.testing.assert_allclose(logits[:, 0], expected[:, position], **EXACT)


def test_all_are_floats_once_the_graph_is_open_and_four_bits_before(tmp_path: Path) -> None:
    few = few_bits(tmp_path / "source", "llama")
    graph = export_decoder(few, EXPANDED).graph
    stored = {tensor.name: tensor for tensor in graph.graph.initializer if tensor.data_type == onnx.TensorProto.INT4}
    kernels = export_decoder(few).graph
    assert len(stored) == sum(node.op_type == "MatMulNBits" for node in kernels.graph.node)
    weights = sum(int(np.prod(tensor.dims)) for tensor in stored.values())
    assert sum(len(tensor.raw_data) for tensor in stored.values()) == weights // 2
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "opened.onnx")
    onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    opened = onnx.load(tmp_path / "opened.onnx").graph
    assert not [tensor.name for tensor in opened.initializer if tensor.data_type == onnx.TensorProto.INT4]
    floats = sum(
        int(np.prod(tensor.dims)) for tensor in opened.initializer if tensor.data_type == onnx.TensorProto.FLOAT
    )
    assert weights < floats < 1.3 * weights  # scales, norms and the table of rotations are the rest


def weight(bits: int, symmetric: bool, columns: int = 96, group_size: int = 32) -> QuantizedWeight:
    """Random integers, scales and zero points of 24 rows."""
    generator = torch.Generator().manual_seed(bits)
    groups = columns // group_size
    zeros = torch.randint(0, 1 << bits, (24, groups), generator=generator)
    return QuantizedWeight(
        integers=torch.randint(0, 1 << bits, (24, columns), generator=generator).to(torch.uint8),
        scales=(torch.rand(24, groups, generator=generator) + 0.1).half().float(),
        zero_points=(torch.full_like(zeros, 1 << (bits - 1)) if symmetric else zeros).to(torch.uint8),
        bits=bits,
        group_size=group_size,
    )


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_products_block_by_block_and_whole_are_those_of_the_weight_itself(bits: int, symmetric: bool) -> None:
    quantized = weight(bits, symmetric)
    scales = quantized.scales.repeat_interleave(32, dim=1).numpy()
    zeros = quantized.zero_points.repeat_interleave(32, dim=1).numpy()
    matrix = (quantized.integers.numpy().astype(np.float64) - zeros) * scales
    value = np.random.default_rng(0).normal(size=(2, 5, 96)).astype(np.float32)
    expected = value @ matrix.T
    for product in products(store(quantized, "layer"), value):
        np.testing.assert_allclose(product, expected, atol=1e-5 * np.abs(expected).max())


def products(stored: StoredWeight, value: np.ndarray) -> list[np.ndarray]:
    """Block by block, and with the whole weight, by ONNX Runtime."""
    nodes = GraphBuilder()
    graph_input = nodes.input("x", ir.DataType.FLOAT, value.shape)
    outputs = [multiply_expanded(nodes, "blocks", graph_input, stored)]
    outputs.append(nodes.op("MatMul", "whole", [graph_input, expand_weight(nodes, "whole", stored)]))
    for index, output in enumerate(outputs):
        nodes.output(output, f"y{index}", ir.DataType.FLOAT, (2, 5, stored.rows))
    content = ir.to_proto(nodes.model("both")).SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    results: list[np.ndarray] = session.run(None, {"x": value})
    return results


@pytest.mark.parametrize(
    ("bits", "columns", "group_size"), [(3, 96, 32), (4, 100, 32)], ids=["three bits", "a block too long"]
)
def test_what_does_not_fit_is_refused_by_name(bits: int, columns: int, group_size: int) -> None:
    quantized = weight(bits, True, 128, group_size)
    quantized = QuantizedWeight(
        quantized.integers[:, :columns], quantized.scales, quantized.zero_points, bits, group_size
    )
    with pytest.raises(ModelError, match=f"{bits} bits, {columns} columns in blocks of 32") as error:
        expand_weight(GraphBuilder(), "model.layers.0.mlp.up_proj", store(quantized, "layer"))
    assert "up_proj" in str(error.value) and "leave expand_on_load out" in str(error.value)


def test_a_float_checkpoint_has_nothing_to_expand(tmp_path: Path) -> None:
    checkpoint = save_tiny_llama(tmp_path)
    assert export_decoder(checkpoint, EXPANDED).graph == export_decoder(checkpoint).graph


def test_experts_are_refused(tmp_path: Path) -> None:
    config = MixtralConfig(
        vocab_size=160, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=256,
    )  # fmt: skip
    with pytest.raises(ModelError, match="Experts cannot be expanded"):
        export_decoder(save_decoder(tmp_path, config), EXPANDED)
