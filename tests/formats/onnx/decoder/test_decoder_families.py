"""Decoders of many families: what each has that no Llama has, against transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from written_decoders import FewBitsCheckpoint

from compress.formats.generation.decoder import Decoder
from compress.formats.onnx.decoder import GraphSettings, export_verified_decoder
from compress.formats.onnx.decoder.apply_patches import inverse_error_function
from compress.formats.onnx.decoder.trace import trace_part
from compress.formats.onnx.decoder.traced_parts import decoder_only
from compress.formats.onnx.runtimes.onnxruntime import OnnxSession
from compress.models.checkpoint import Checkpoint
from compress.models.quantized_module import load_quantized_module
from compress.utils.errors import IntegrityError

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MIXED = ["sliding_attention", "full_attention"]
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "vocab_size": 96}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 16, "v_head_dim": 16, "qk_nope_head_dim": 16}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
LINEAR = {
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_conv_kernel_dim": 4,
    "shared_expert_intermediate_size": 48,
    "layer_types": ["linear_attention", "full_attention"],
}
MAMBA = {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1, "chunk_size": 8}
FAMILIES: dict[str, tuple[dict[str, Any], str]] = {
    "gemma2": ({**SIZES, "sliding_window": 6, "query_pre_attn_scalar": 24}, ""),  # windows, soft caps, norms about 1
    "gpt_oss": (
        {**SIZES, **EXPERTS, "sliding_window": 6, "layer_types": MIXED},
        "",
    ),  # sinks, experts with biases
    "gpt2": (GPT2, ""),  # learned positions, matrices stored [in, out]
    "gpt_neox": ({**SIZES, "rotary_pct": 0.5}, ""),  # a head under another name, a part of each head rotated
    "cohere2": ({**SIZES, "sliding_window": 6, "layer_types": MIXED}, ""),  # pairs side by side, no rotation in some
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
    """A model whose norms are off 1 and biases off 0, and whose logits spread."""
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


@pytest.mark.parametrize("kind", FAMILIES)
def test_each_family_equals_torch_and_says_what_is_not_fused(kind: str, tmp_path) -> None:
    fields, unfused = FAMILIES[kind]
    checkpoint, _ = save(kind, fields, tmp_path)
    verified = export_verified_decoder(
        checkpoint, GraphSettings(), some_ids(20), 1e-3, 0.2
    )  # past two chunks of Mamba's 8
    assert verified.equality.difference < 1e-4
    assert unfused in verified.unfused and bool(unfused) == bool(verified.unfused)
    attentions = sum(node.op_type == "GroupQueryAttention" for node in verified.model.graph.graph.node)
    states = fields.get("layer_types", []).count("conv") + fields.get("layer_types", []).count("linear_attention")
    assert attentions == (0 if unfused else 2 - states)


def test_one_block_of_each_kind_is_traced_and_all_are_written(tmp_path) -> None:
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


def test_states_of_convolutions_go_from_token_to_token(tmp_path) -> None:
    checkpoint, model = save("lfm2", FAMILIES["lfm2"][0], tmp_path)
    exported = export_verified_decoder(checkpoint, GraphSettings(), some_ids(12), 1e-3, 0.2).model
    name = "CPUExecutionProvider"
    graph = onnxruntime.InferenceSession(exported.graph.SerializeToString(), providers=[name])
    decoder = Decoder(OnnxSession(graph, Path("a test"), name, 0), "a test")
    prompt = some_ids(7)[0].tolist()
    answer = [decoder.prefill(prompt)]
    while len(answer) < 12:
        answer.append(decoder.step(answer[-1]))
    with torch.inference_mode():
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert answer == expected[0, 7:].tolist()
    assert "past_conv.0" in {entry.name for entry in graph.get_inputs()}


def test_the_inverse_of_the_error_function() -> None:
    values = torch.linspace(-0.9999, 0.9999, 2001)
    torch.testing.assert_close(inverse_error_function(values), torch.erfinv(values), atol=1e-6, rtol=1e-6)


def test_a_quantized_table_keeps_the_scale_of_its_class(tmp_path) -> None:
    """Gemma multiplies its embeddings; integers in their place are multiplied too, in torch as in the graph."""
    checkpoint, _ = save("gemma2", FAMILIES["gemma2"][0], tmp_path)
    few = FewBitsCheckpoint(checkpoint.folder, (("embed_tokens", 4), ("_proj", 4)))
    verified = export_verified_decoder(few, GraphSettings(accuracy_level=1), some_ids(12), 1e-3, 0.2)
    assert verified.equality.difference < 1e-4
    module = load_quantized_module(few)
    expected = few.quantized("model.embed_tokens").dequantize()[:5] * 64**0.5
    torch.testing.assert_close(module.get_input_embeddings()(torch.arange(5)), expected)


def test_a_graph_that_holds_for_one_length_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a node for its scan Mamba's first kind goes from token to token in Python, which a trace unrolls."""
    monkeypatch.setattr("compress.formats.onnx.decoder.apply_patches._SELECTIVE_SCANS", "")
    checkpoint, _ = save("mamba", {**SIZES, "state_size": 4}, tmp_path)
    with pytest.raises(IntegrityError, match="does not run on 12 tokens after 0"):
        export_verified_decoder(checkpoint, GraphSettings(), some_ids(12), 1e-3, 0.2)
