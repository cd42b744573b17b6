"""Tests of packed quantized weights: kernels and expanded graphs are compared with the dequantized weights."""

from __future__ import annotations

from pathlib import Path

import exports
import numpy as np
import onnx_ir as ir
import pytest
import torch
from adapters import save_adapter
from onnx import TensorProto, helper
from onnx_graphs import onnx_model
from peft import PeftModel
from quantized import quantize_tiny_llama, save_tiny_llama
from transformers import MixtralConfig
from written_decoders import CONFIGS, FewBitsCheckpoint, Graph, by_transformers, logits_of, random_ids, save_decoder

from compress.formats.gguf.export import plan_gguf
from compress.formats.onnx.decoder import GraphSettings, export_decoder, verify_decoder
from compress.formats.onnx.decoder.graph_builder import GraphBuilder
from compress.formats.onnx.decoder.stored_weight import (
    StoredWeight,
    expand_weight,
    join_planes,
    split_planes,
    store,
)
from compress.models.checkpoint import Checkpoint
from compress.models.lora_adapter import low_rank
from compress.models.model import TorchModel
from compress.models.quantized_module import load_quantized_module
from compress.numerics.integer_grid import QuantizedWeight
from compress.tasks.registry import TASKS
from compress.utils.errors import ModelError

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


def weight(rows: int, columns: int, bits: int, group_size: int, symmetric: bool, seed: int = 0) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(seed)
    groups = -(-columns // group_size)
    middle = torch.full((rows, groups), 1 << (bits - 1))
    zeros = middle if symmetric else torch.randint(0, 1 << bits, (rows, groups), generator=generator)
    return QuantizedWeight(integers=torch.randint(0, 1 << bits, (rows, columns), generator=generator).to(torch.uint8),
        scales=(torch.rand(rows, groups, generator=generator) + 0.1).half().float(), zero_points=zeros.to(torch.uint8),
        bits=bits, group_size=group_size)  # fmt: skip


def kernel(operator: str, stored: StoredWeight, given: np.ndarray, **attributes: int) -> np.ndarray:
    """Return the output of ONNX Runtime's kernel for the input ``given`` and the stored weight."""
    integers = stored.integers() if operator == "MatMulNBits" else stored.integers().reshape(stored.rows, -1)
    stores = {"b": integers, "s": stored.scales.astype(np.float32)}
    zeros = stored.packed_zero_points()
    stores |= {} if zeros is None else {"z": zeros}
    order = ["x", "b", "s", "z"] if operator == "MatMulNBits" else ["b", "x", "s", "z"]
    node = helper.make_node(operator, [name for name in order if name == "x" or name in stores], ["y"],
        domain="com.microsoft", bits=stored.kernel_bits, block_size=stored.block_size, **attributes)  # fmt: skip
    kind = FLOAT if given.dtype == np.float32 else INT64
    model = onnx_model([node], {"x": (kind, given.shape)}, {"y": None}, stores, 21, ["com.microsoft"])
    return exports.run(model, x=given)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("bits", "columns", "group_size"),
    [
        (2, 64, 32),
        (3, 128, 64),
        (4, 96, 32),
        (4, 192, 96),
        (5, 64, 16),
        (6, 96, 96),
        (7, 64, 64),
        (8, 576, 576),
        (4, 72, 32),
    ],
)
def test_kernels_read_the_dequantized_weights(bits: int, columns: int, group_size: int, symmetric: bool) -> None:
    quantized = weight(24, columns, bits, group_size, symmetric)
    stored = store(quantized, "w")
    expected = quantized.dequantize().numpy()
    rows = np.eye(columns, dtype=np.float32)
    actual = kernel("MatMulNBits", stored, rows, K=columns, N=24, accuracy_level=1)
    np.testing.assert_allclose(actual.T, expected, rtol=1e-6, atol=1e-6)
    picked = np.array([[5, 0, 23]])
    looked_up = kernel("GatherBlockQuantized", stored, picked, gather_axis=0, quantize_axis=1)
    # The last block of a row is padded.
    np.testing.assert_allclose(looked_up[..., :columns], expected[picked], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_bit_planes_are_compact_and_join_exactly(bits: int) -> None:
    values = np.random.default_rng(bits).integers(0, 1 << bits, (5, 32)).astype(np.uint8)
    planes = split_planes(values, bits)
    assert sum(plane.nbytes for plane in planes) == 5 * 32 * bits // 8
    nodes = GraphBuilder()
    graph_inputs = [nodes.input(f"p{index}", ir.DataType.UINT8, plane.shape) for index, plane in enumerate(planes)]
    nodes.output(join_planes(nodes, "w", graph_inputs, bits, (5, 32)), "y", ir.DataType.UINT8, [5, 32])
    actual = exports.run(nodes.model("planes"), **{f"p{index}": plane for index, plane in enumerate(planes)})
    np.testing.assert_array_equal(actual, values)


def test_group_sizes_without_matching_block_are_refused() -> None:
    with pytest.raises(ModelError, match="Groups of 24") as error:
        store(weight(4, 48, 4, 24, True), "model.layers.0.mlp.up_proj")
    assert error.value.where == "model.layers.0.mlp.up_proj"


EXACT = {"atol": 2e-4, "rtol": 1e-4}
EXPANDED = GraphSettings(expand_on_load=True)


def few_bits(folder: Path, name: str, bits: int = 4) -> FewBitsCheckpoint:
    """Return a tiny decoder with every matrix quantized to ``bits``."""
    modules = ("_proj", "embed_tokens", "lm_head")
    return FewBitsCheckpoint(save_decoder(folder, CONFIGS[name]).folder, tuple((module, bits) for module in modules))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", ["llama", "llama with biases", "mistral", "qwen2", "qwen3"])
def test_expanded_prompt_and_single_tokens_match_torch(name: str, bits: int, tmp_path: Path) -> None:
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


@pytest.mark.parametrize(
    ("bits", "columns", "group_size"), [(3, 96, 32), (4, 100, 32)], ids=["three bits", "a block too long"]
)
def test_weights_that_cannot_be_expanded_are_refused(bits: int, columns: int, group_size: int) -> None:
    quantized = weight(24, 128, bits, group_size, True, seed=bits)
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


IDS = (np.arange(48).reshape(2, 24) * 3) % 150
"""peft calls what transformers will remove."""


def adapted(tmp_path: Path, *targets: str, quantized: bool = True, **fields: object) -> Checkpoint:
    """Return a checkpoint with a LoRA adapter; the head is untied if adapted, since peft cannot adapt a tied head."""
    source = save_tiny_llama(tmp_path / "source", tie_word_embeddings="lm_head" not in targets)
    checkpoint = quantize_tiny_llama(source, tmp_path / "quantized") if quantized else source
    module = TorchModel.load(source.folder, TASKS["text-generation"]).module
    save_adapter(module, checkpoint.folder / "adapter", *targets, **fields)
    return checkpoint


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("targets", [("q_proj", "v_proj", "down_proj"), ("k_proj", "gate_proj"), ("lm_head",)])
def test_graph_with_adapter_matches_peft(tmp_path: Path, targets: tuple[str, ...], quantized: bool) -> None:
    checkpoint = adapted(tmp_path, *targets, quantized=quantized)
    model = export_decoder(checkpoint, GraphSettings(accuracy_level=1))
    base = load_quantized_module(checkpoint)
    with torch.no_grad():
        without = base(input_ids=torch.from_numpy(IDS)).logits.numpy()
        opened = PeftModel.from_pretrained(base, str(checkpoint.folder / "adapter"))
        expected = opened(input_ids=torch.from_numpy(IDS)).logits.numpy()
    assert np.abs(expected - without).max() > 0.1
    np.testing.assert_allclose(Graph(model.graph).run(IDS)[0], expected, rtol=1e-3, atol=1e-3)
    assert verify_decoder(model, checkpoint, IDS, 1e-2, 0.1).difference < 1e-2


def test_dora_adapters_are_refused(tmp_path: Path) -> None:
    checkpoint = adapted(tmp_path, "q_proj", quantized=False, use_dora=True)
    with pytest.raises(ModelError, match="more than a product"):
        low_rank(checkpoint)


def test_gguf_refuses_checkpoints_with_adapter(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has an adapter, which GGUF keeps in a file of its own"):
        plan_gguf(adapted(tmp_path, "q_proj"))
