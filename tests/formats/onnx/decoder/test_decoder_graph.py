"""Tests of decoder graphs traced from transformers' modules: logits are compared with those of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from quantized import quantize_tiny_llama, save_tiny_llama
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedModel, RwkvConfig, RwkvForCausalLM
from written_decoders import (
    CONFIGS,
    FewBitsCheckpoint,
    Graph,
    by_transformers,
    greedy_tokens,
    logits_of,
    random_ids,
    save_decoder,
    tokens_of_transformers,
)

from compress.formats.generation.decoder import Decoder
from compress.formats.onnx.decoder import GraphSettings, export_decoder, export_verified_decoder
from compress.formats.onnx.decoder.graph_builder import LEFT_PADDING_CHECK
from compress.formats.onnx.decoder.trace import check_writable, trace_part
from compress.formats.onnx.decoder.traced_parts import decoder_only
from compress.formats.onnx.runtimes.onnxruntime import OnnxSession
from compress.models.checkpoint import Checkpoint
from compress.models.quantized_module import load_quantized_module
from compress.pipeline.integrity import inspector_of
from compress.utils.errors import IntegrityError, ModelError

EXACT = {"atol": 2e-4, "rtol": 1e-4}
FP32 = GraphSettings(accuracy_level=1)


@pytest.mark.parametrize("name", CONFIGS)
def test_each_architecture_matches_transformers(name: str, tmp_path) -> None:
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


def test_names_and_shapes_follow_client_conventions(tmp_path) -> None:
    graph = Graph(export_decoder(save_tiny_llama(tmp_path)).graph)
    cache = [f"{layer}.{kind}" for layer in range(2) for kind in ("key", "value")]
    assert graph.inputs == {
        "input_ids": ["batch_size", "sequence_length"],
        "attention_mask": ["batch_size", "total_sequence_length"],
        **{f"past_key_values.{name}": ["batch_size", 2, "past_sequence_length", 16] for name in cache},
    }
    assert graph.outputs == ["logits", *(f"present.{name}" for name in cache)]


def test_right_padded_rows_match_unpadded_rows(tmp_path) -> None:
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


def test_left_padding_is_refused(tmp_path) -> None:
    graph = Graph(export_decoder(save_tiny_llama(tmp_path)).graph)
    mask = np.ones((2, 6), np.int64)
    mask[1, :2] = 0
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument, match=LEFT_PADDING_CHECK):
        graph.run(random_ids(2, 6), mask)


@pytest.mark.parametrize("name", CONFIGS)
def test_quantized_checkpoint_matches_torch_with_dequantized_weights(name: str, tmp_path) -> None:
    source = save_decoder(tmp_path / "source", CONFIGS[name])
    quantized = quantize_tiny_llama(source, tmp_path / "quantized", group_size=32)
    ids = random_ids(2, 21)
    expected = logits_of(by_transformers(source, quantized), ids)
    logits, _ = Graph(export_decoder(quantized, FP32).graph).run(ids)
    np.testing.assert_allclose(logits, expected, **EXACT)
    rounded, _ = Graph(export_decoder(quantized).graph).run(ids)
    assert 1e-3 < np.abs(rounded - expected).max() < 0.1 * np.ptp(expected)


def check_exact(source: Checkpoint, quantized: Any) -> None:
    """Check that the graph of a quantized checkpoint matches torch with the dequantized weights."""
    ids = random_ids(2, 9)
    logits, _ = Graph(export_decoder(quantized, FP32).graph).run(ids)
    np.testing.assert_allclose(logits, logits_of(by_transformers(source, quantized), ids), **EXACT)


MIXED = (("q_proj", 8), ("k_proj", 3), ("v_proj", 5), ("gate_proj", 6), ("down_proj", 7), ("embed_tokens", 5))


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        *((name, MIXED) for name in ("llama", "qwen2", "qwen3")),
        ("llama with biases", (("lm_head", 4), ("embed_tokens", 8))),
    ],
)
def test_mixed_bits_within_a_layer_and_untied_head(name: str, bits: Any, tmp_path) -> None:
    source = save_decoder(tmp_path, CONFIGS[name])
    check_exact(source, FewBitsCheckpoint(source.folder, bits))


def test_no_unused_initializers_are_stored(tmp_path) -> None:
    source = save_decoder(tmp_path, CONFIGS["llama with biases"])
    for bits in ((("_proj", 4),), (("q_proj", 8), ("k_proj", 3), ("gate_proj", 6))):
        graph = export_decoder(FewBitsCheckpoint(source.folder, bits)).graph.graph
        read = {name for node in graph.node for name in node.input}
        assert {tensor.name for tensor in graph.initializer} <= read


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "gelu"},
        {"head_dim": 24},
        {"head_dim": 12},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ],
)
def test_attention_unsupported_by_the_kernel_is_traced_unfused(changes: dict[str, object], tmp_path) -> None:
    """Cases: an activation, head sizes that the kernel cannot rotate or take at all, partial rotary embeddings."""
    checkpoint = save_decoder(tmp_path, LlamaConfig(**{**CONFIGS["llama"].to_dict(), **changes}))
    ids = random_ids(2, 9)
    whole, _ = Graph(export_decoder(checkpoint).graph).run(ids)
    np.testing.assert_allclose(whole, logits_of(by_transformers(checkpoint), ids), **EXACT)


def test_model_with_its_own_cache_class_is_refused(tmp_path) -> None:
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


SIZES = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
ALTERNATING = ["sliding_attention", "full_attention"]
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "vocab_size": 96}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 16, "v_head_dim": 16, "qk_nope_head_dim": 16}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
LINEAR = {"linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_conv_kernel_dim": 4, "shared_expert_intermediate_size": 48,
    "layer_types": ["linear_attention", "full_attention"]}  # fmt: skip
MAMBA = {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1, "chunk_size": 8}
SLOW_FAMILIES = ("mamba2", "qwen3_next")
FAMILIES: dict[str, tuple[dict[str, Any], str]] = {
    "gemma2": ({**SIZES, "sliding_window": 6, "query_pre_attn_scalar": 24}, ""),  # windows, soft caps, norms about 1
    # sinks, experts with biases
    "gpt_oss": ({**SIZES, **EXPERTS, "sliding_window": 6, "layer_types": ALTERNATING}, ""),
    "gpt2": (GPT2, ""),  # learned positions, matrices stored [in, out]
    "gpt_neox": ({**SIZES, "rotary_pct": 0.5}, ""),  # a head under another name, a part of each head rotated
    # pairs side by side, no rotation in some
    "cohere2": ({**SIZES, "sliding_window": 6, "layer_types": ALTERNATING}, ""),
    "lfm2": ({**SIZES, "layer_types": ["conv", "full_attention"], "conv_L_cache": 3}, ""),
    "qwen3_next": ({**SIZES, **EXPERTS, **LINEAR}, ""),  # the gated delta rule
    "mamba": ({**SIZES, "state_size": 8}, "no attention"),  # the selective scan
    "mamba2": ({**SIZES, **MAMBA}, "no attention"),
    "falcon": ({key: SIZES[key] for key in SIZES if key != "head_dim"}, "no attention with transformers' interface"),
    "deepseek_v3": (
        {**SIZES, **LATENT, **EXPERTS, "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_key_value_heads": 4},
        "keys or values are changed after the cache",
    ),
}


def save(kind: str, fields: dict[str, Any], folder: Path) -> tuple[Checkpoint, PreTrainedModel]:
    """Save a random decoder whose norm weights are not 1, biases not 0 and logits well spread."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields)).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and "A_log" not in name and "dt_bias" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif parameter.ndim == 2:
                parameter.copy_(torch.randn_like(parameter) / (1 if "embed" in name else parameter.shape[-1] ** 0.5))
    model.tie_weights()
    model.save_pretrained(folder)
    return Checkpoint(folder), model


def some_ids(length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(3, 96, (2, length))


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow if kind in SLOW_FAMILIES else ()) for kind in FAMILIES]
)
def test_each_family_matches_torch_and_reports_unfused_attention(kind: str, tmp_path) -> None:
    fields, unfused = FAMILIES[kind]
    checkpoint, _ = save(kind, fields, tmp_path)
    # 20 tokens are more than two of Mamba's chunks of 8.
    verified = export_verified_decoder(checkpoint, GraphSettings(), some_ids(20), 1e-3, 0.2)
    assert verified.equality.difference < 1e-4
    assert unfused in verified.unfused and bool(unfused) == bool(verified.unfused)
    attentions = sum(node.op_type == "GroupQueryAttention" for node in verified.model.graph.graph.node)
    states = fields.get("layer_types", []).count("conv") + fields.get("layer_types", []).count("linear_attention")
    assert attentions == (0 if unfused else 2 - states)
    # What the integrity check of a run looks at. A router's mask holds -inf, which is no damage.
    assert all(np.isfinite(array).all() for _, array in inspector_of(verified.model).float_arrays())


def test_one_block_per_layer_type_is_traced_and_all_are_exported(tmp_path) -> None:
    kinds = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    fields = {**SIZES, "num_hidden_layers": 6, "sliding_window": 5, "layer_types": kinds}
    checkpoint, _ = save("gemma3_text", fields, tmp_path)
    trace = trace_part(checkpoint, decoder_only)
    assert trace.traced == 3
    assert [block.kind for block in trace.blocks] == [0, 0, 2, 0, 0, 2]
    verified = export_verified_decoder(checkpoint, GraphSettings(), some_ids(14), 1e-3, 0.2)
    assert verified.equality.difference < 1e-4
    names = {entry.name for entry in verified.model.graph.graph.input}
    assert {f"past_key_values.{layer}.key" for layer in range(6)} <= names


def test_convolution_states_are_carried_between_tokens(tmp_path) -> None:
    checkpoint, model = save("lfm2", FAMILIES["lfm2"][0], tmp_path)
    exported = export_verified_decoder(checkpoint, GraphSettings(), some_ids(12), 1e-3, 0.2).model
    name = "CPUExecutionProvider"
    graph = onnxruntime.InferenceSession(exported.graph.SerializeToString(), providers=[name])
    decoder = Decoder(OnnxSession(graph, Path("a test"), name, 0), "a test")
    prompt = some_ids(7)[0].tolist()
    assert greedy_tokens(decoder, prompt, 12) == tokens_of_transformers(model, prompt, 12)
    assert "past_conv.0" in {entry.name for entry in graph.get_inputs()}


def test_quantized_embeddings_keep_gemmas_scale(tmp_path) -> None:
    """Gemma multiplies its embeddings by sqrt(hidden size), which must also hold for quantized embeddings."""
    checkpoint, _ = save("gemma2", FAMILIES["gemma2"][0], tmp_path)
    few = FewBitsCheckpoint(checkpoint.folder, (("embed_tokens", 4), ("_proj", 4)))
    verified = export_verified_decoder(few, GraphSettings(accuracy_level=1), some_ids(12), 1e-3, 0.2)
    assert verified.equality.difference < 1e-4
    module = load_quantized_module(few)
    expected = few.quantized("model.embed_tokens").dequantize()[:5] * 64**0.5
    torch.testing.assert_close(module.get_input_embeddings()(torch.arange(5)), expected)


def test_graph_valid_for_one_length_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an ONNX node for its scan, Mamba loops over tokens in Python, which tracing unrolls for one length."""
    monkeypatch.setattr("compress.formats.onnx.decoder.apply_patches._SELECTIVE_SCANS", "")
    checkpoint, _ = save("mamba", {**SIZES, "state_size": 4}, tmp_path)
    with pytest.raises(IntegrityError, match="does not run on 12 tokens after 0"):
        export_verified_decoder(checkpoint, GraphSettings(), some_ids(12), 1e-3, 0.2)
