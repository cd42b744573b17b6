"""Decoders traced through transformers' modules, against the same weights in transformers."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
from quantized import quantize_tiny_llama, save_tiny_llama
from transformers import LlamaConfig, RwkvConfig, RwkvForCausalLM
from written_decoders import CONFIGS, FewBitsCheckpoint, Graph, by_transformers, logits_of, random_ids, save_decoder

from compress.formats.onnx.decoder import GraphSettings, export_decoder
from compress.formats.onnx.decoder.macro_ops import LEFT_PADDING_CHECK
from compress.formats.onnx.decoder.trace import check_writable
from compress.models.checkpoint import Checkpoint
from compress.utils.errors import ModelError

EXACT = {"atol": 2e-4, "rtol": 1e-4}
FP32 = GraphSettings(accuracy_level=1)


@pytest.mark.parametrize("name", CONFIGS)
def test_each_architecture_equals_transformers(name: str, tmp_path) -> None:
    checkpoint = save_decoder(tmp_path, CONFIGS[name])
    ids = random_ids(2, 21)
    expected = logits_of(by_transformers(checkpoint), ids)
    graph = Graph(export_decoder(checkpoint).graph)
    whole, _ = graph.run(ids)
    np.testing.assert_allclose(whole, expected, **EXACT)
    logits, past = graph.run(ids[:, :5])
    for position in range(5, 21):
        logits, past = graph.run(ids[:, position : position + 1], past=past)
        np.testing.assert_allclose(logits[:, 0], expected[:, position], **EXACT)


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral"])
def test_the_cache_is_that_of_transformers(name: str, tmp_path) -> None:
    checkpoint = save_decoder(tmp_path, CONFIGS[name])
    ids = random_ids(2, 7)
    _, past = Graph(export_decoder(checkpoint).graph).run(ids)
    with torch.inference_mode():
        cache = by_transformers(checkpoint)(torch.from_numpy(ids), use_cache=True).past_key_values
    for layer in range(2):
        np.testing.assert_allclose(past[f"past_key_values.{layer}.key"], cache.layers[layer].keys, **EXACT)
        np.testing.assert_allclose(past[f"past_key_values.{layer}.value"], cache.layers[layer].values, **EXACT)


def test_names_and_shapes_are_those_that_clients_expect(tmp_path) -> None:
    graph = Graph(export_decoder(save_tiny_llama(tmp_path)).graph)
    cache = [f"{layer}.{kind}" for layer in range(2) for kind in ("key", "value")]
    assert graph.inputs == {
        "input_ids": ["batch_size", "sequence_length"],
        "attention_mask": ["batch_size", "total_sequence_length"],
        **{f"past_key_values.{name}": ["batch_size", 2, "past_sequence_length", 16] for name in cache},
    }
    assert graph.outputs == ["logits", *(f"present.{name}" for name in cache)]


def test_rows_padded_on_the_right_are_read_and_go_on_as_if_alone(tmp_path) -> None:
    checkpoint = save_decoder(tmp_path, CONFIGS["llama"])
    graph, module = Graph(export_decoder(checkpoint).graph), by_transformers(checkpoint)
    ids = random_ids(2, 9)
    mask = np.ones((2, 6), np.int64)
    mask[1, 4:] = 0
    logits, past = graph.run(ids[:, :6], mask)
    np.testing.assert_allclose(logits[0], logits_of(module, ids[:1, :6])[0], **EXACT)
    np.testing.assert_allclose(logits[1, :4], logits_of(module, ids[1:, :4])[0], **EXACT)
    for position in range(6, 9):
        mask = np.concatenate([mask, np.ones((2, 1), np.int64)], axis=1)
        logits, past = graph.run(ids[:, position : position + 1], mask, past)
        alone = np.concatenate([ids[1:, :4], ids[1:, 6 : position + 1]], axis=1)
        np.testing.assert_allclose(logits[0, 0], logits_of(module, ids[:1, : position + 1])[0, -1], **EXACT)
        np.testing.assert_allclose(logits[1, 0], logits_of(module, alone)[0, -1], **EXACT)


def test_padding_on_the_left_is_refused_by_name(tmp_path) -> None:
    graph = Graph(export_decoder(save_tiny_llama(tmp_path)).graph)
    mask = np.ones((2, 6), np.int64)
    mask[1, :2] = 0
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument, match=LEFT_PADDING_CHECK):
        graph.run(random_ids(2, 6), mask)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_quantized_checkpoint_equals_torch_with_the_weights_it_stands_for(name: str, tmp_path) -> None:
    source = save_decoder(tmp_path / "source", CONFIGS[name])
    quantized = quantize_tiny_llama(source, tmp_path / "quantized", group_size=32)
    ids = random_ids(2, 21)
    expected = logits_of(by_transformers(source, quantized), ids)
    logits, _ = Graph(export_decoder(quantized, FP32).graph).run(ids)
    np.testing.assert_allclose(logits, expected, **EXACT)
    rounded, _ = Graph(export_decoder(quantized).graph).run(ids)
    assert 1e-3 < np.abs(rounded - expected).max() < 0.1 * np.ptp(expected)


@pytest.mark.parametrize(("bits", "group_size", "table_bits"), [(2, 32, 8), (3, 64, 3), (8, 16, None), (4, 64, 2)])
def test_bits_and_groups(bits: int, group_size: int, table_bits: int | None, tmp_path) -> None:
    source = save_tiny_llama(tmp_path / "source")
    quantized = quantize_tiny_llama(source, tmp_path / "quantized", bits, group_size, table_bits)
    ids = random_ids(2, 9)
    expected = logits_of(by_transformers(source, quantized), ids)
    logits, _ = Graph(export_decoder(quantized, FP32).graph).run(ids)
    np.testing.assert_allclose(logits, expected, **EXACT)


MIXED = (("q_proj", 8), ("k_proj", 3), ("v_proj", 5), ("gate_proj", 6), ("down_proj", 7), ("embed_tokens", 5))


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_bits_mixed_within_a_layer(name: str, tmp_path) -> None:
    source = save_decoder(tmp_path, CONFIGS[name])
    mixed = FewBitsCheckpoint(source.folder, MIXED)
    ids = random_ids(2, 9)
    expected = logits_of(by_transformers(source, mixed), ids)
    logits, _ = Graph(export_decoder(mixed, FP32).graph).run(ids)
    np.testing.assert_allclose(logits, expected, **EXACT)


def test_exact_attention_takes_queries_keys_and_values_out_of_the_rounding(tmp_path) -> None:
    source = save_decoder(tmp_path, CONFIGS["llama"])
    few = FewBitsCheckpoint(source.folder, (("_proj", 4),))
    nodes = export_decoder(few, GraphSettings(exact_attention=True)).graph.graph.node
    levels = {
        node.name.split("/")[-2]: attribute.i
        for node in nodes
        for attribute in node.attribute
        if attribute.name == "accuracy_level"
    }
    assert levels == {"q_k_v_proj": 1, "o_proj": 4, "gate_up_proj": 4, "down_proj": 4}


def test_nothing_is_stored_that_no_node_reads(tmp_path) -> None:
    source = save_decoder(tmp_path, CONFIGS["llama with biases"])
    for bits in ((("_proj", 4),), (("q_proj", 8), ("k_proj", 3), ("gate_proj", 6))):
        graph = export_decoder(FewBitsCheckpoint(source.folder, bits)).graph.graph
        read = {name for node in graph.node for name in node.input}
        assert {tensor.name for tensor in graph.initializer} <= read


def test_a_head_of_its_own_is_quantized_too(tmp_path) -> None:
    source = save_decoder(tmp_path, CONFIGS["llama with biases"])
    few = FewBitsCheckpoint(source.folder, (("lm_head", 4), ("embed_tokens", 8)))
    ids = random_ids(2, 9)
    logits, _ = Graph(export_decoder(few, FP32).graph).run(ids)
    np.testing.assert_allclose(logits, logits_of(by_transformers(source, few), ids), **EXACT)


def test_the_last_token_only(tmp_path) -> None:
    checkpoint = save_tiny_llama(tmp_path)
    ids = random_ids(2, 9)
    whole, _ = Graph(export_decoder(checkpoint).graph).run(ids)
    last, _ = Graph(export_decoder(checkpoint, GraphSettings(last_token_only=True)).graph).run(ids)
    assert last.shape == (2, 1, 160)
    np.testing.assert_allclose(last[:, 0], whole[:, -1], **EXACT)


def test_the_tied_weight_is_stored_once(tmp_path) -> None:
    source = save_tiny_llama(tmp_path / "source")
    quantized = quantize_tiny_llama(source, tmp_path / "quantized")
    floats = sum(source.stored(name).numel() for name in source.files)
    whole = export_decoder(source).graph.ByteSize()
    assert 4 * floats < whole < 4 * floats + 12_000
    norms = 5 * 64
    weights = floats - norms
    bits = 4 * weights + 16 * weights // 32 + 32 * norms
    assert bits / 8 < export_decoder(quantized).graph.ByteSize() < bits / 8 + 18_000


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "gelu"},
        {"head_dim": 24},
        {"head_dim": 12},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ],
)
def test_what_the_attention_kernel_lacks_is_traced_as_it_is(changes: dict[str, object], tmp_path) -> None:
    """An activation, heads that cannot be rotated there, heads that it cannot take at all, and half a rotation."""
    checkpoint = save_decoder(tmp_path, LlamaConfig(**{**CONFIGS["llama"].to_dict(), **changes}))
    ids = random_ids(2, 9)
    whole, _ = Graph(export_decoder(checkpoint).graph).run(ids)
    np.testing.assert_allclose(whole, logits_of(by_transformers(checkpoint), ids), **EXACT)


def test_a_model_with_a_cache_of_its_own_is_refused_by_name(tmp_path) -> None:
    config = RwkvConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, context_length=64)
    RwkvForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="RwkvForCausalLM cannot be written as an ONNX decoder") as error:
        check_writable(tmp_path)
    assert error.value.expected and error.value.hint


def test_a_missing_tensor_is_named(tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    checkpoint = save_tiny_llama(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"layers\.1\.self_attn\.k_proj\.weight"):
        export_decoder(Checkpoint(checkpoint.folder))
