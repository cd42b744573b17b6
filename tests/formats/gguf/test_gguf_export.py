"""Tests of GGUF export: files are read back by transformers and by llama.cpp's Python package and compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_decoders
import torch
from gguf import GGUFReader
from gguf_families import judge
from mergeable import LLAMA3_ROPE, ROWS, save_mergeable_llama, save_qwen, train_tokenizer
from quantized import quantize_tiny_llama
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from compress.formats.gguf.architecture import GgufArchitecture, check_writable
from compress.formats.gguf.export import FloatType, GgufTypes, compare_gguf, plan_gguf, write_companions, write_gguf
from compress.formats.gguf.model import read_gguf
from compress.models.checkpoint import Checkpoint, QuantizedCheckpoint
from compress.models.transformer_pruning import keep_heads
from compress.sources.conversions import convert_gguf
from compress.utils.errors import ModelError


def quantized_llama(folder: Path, **how: Any) -> QuantizedCheckpoint:
    """Return the tiny Llama in GPTQ format with a BPE tokenizer."""
    checkpoint = quantize_tiny_llama(save_mergeable_llama(folder / "source"), folder / "quantized", **how)
    train_tokenizer().save_pretrained(checkpoint.folder)
    return checkpoint


def read_by_transformers(source: Checkpoint, folder: Path, float_type: FloatType = "f32") -> dict[str, torch.Tensor]:
    """Export ``source`` to GGUF and return the weights that transformers reads from the file."""
    write_gguf(source, folder / "tiny.gguf", GgufTypes(float_type))
    return load_file(convert_gguf(folder / "tiny.gguf", folder / "cache") / "model.safetensors")


@pytest.mark.parametrize(
    ("kind", "own"), [("llama", "q_proj.weight"), ("qwen2", "q_proj.bias"), ("qwen3", "q_norm.weight")]
)
def test_float_weights_round_trip_through_transformers(kind: str, own: str, tmp_path: Path) -> None:
    folder = tmp_path / "source"
    source = save_mergeable_llama(folder) if kind == "llama" else save_qwen(folder, kind)
    state, expected = read_by_transformers(source, tmp_path), load_file(folder / "model.safetensors")
    assert ("lm_head.weight" in expected) is (kind == "qwen2") and any(name.endswith(own) for name in expected)
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("how", "kinds"),
    [
        ({"bits": 4, "group_size": 32}, {"Q4_0"}),
        ({"bits": 4, "group_size": 64, "table_bits": 8}, {"Q4_0", "Q8_0"}),
        ({"bits": 8, "group_size": 32}, {"Q8_0", "Q4_0"}),
        ({"bits": 3, "group_size": 64}, {"Q4_0"}),
        ({"bits": 4, "group_size": 32, "table_bits": None}, {"Q4_0", "F32"}),
    ],
)
def test_quantized_weights_round_trip_exactly(how: dict[str, Any], kinds: set[str], tmp_path: Path) -> None:
    checkpoint = quantized_llama(tmp_path, **how)
    state = read_by_transformers(checkpoint, tmp_path)
    modules = [name.removesuffix(".weight") for name in state]
    assert len(modules) == 1 + 2 * 9 + 1
    for module in modules:
        assert torch.equal(state[f"{module}.weight"], checkpoint.weight(module)), module
    header = read_gguf(tmp_path / "tiny.gguf")
    assert {tensor.dtype for tensor in header.tensors if len(tensor.shape) == 2} == kinds
    assert all(tensor.dtype == "F32" for tensor in header.tensors if len(tensor.shape) == 1)


def test_f16_rounds_only_matrices_and_reports_the_differences(tmp_path: Path) -> None:
    source = save_mergeable_llama(tmp_path / "source")
    write_gguf(source, tmp_path / "half.gguf")
    differences = {difference.name: difference for difference in compare_gguf(tmp_path / "half.gguf", source)}
    assert differences["blk.0.attn_q.weight"].kind == "F16" and 0 < differences["blk.0.attn_q.weight"].largest <= 2**-11
    assert differences["output_norm.weight"].kind == "F32" and differences["output_norm.weight"].largest == 0
    state = read_by_transformers(source, tmp_path, "f16")
    name = "model.layers.1.self_attn.k_proj.weight"
    assert torch.equal(state[name], source.stored(name).half().float())


def test_changed_byte_in_the_file_is_detected(tmp_path: Path) -> None:
    checkpoint = quantized_llama(tmp_path)
    file = tmp_path / "tiny.gguf"
    write_gguf(checkpoint, file)
    assert all(difference.largest == 0 for difference in compare_gguf(file, checkpoint))
    tensors = {tensor.name: tensor for tensor in read_gguf(file).tensors}
    # The tied embedding table is stored once.
    assert tensors["token_embd.weight"].bytes == ROWS * 64 // 32 * 18 and "output.weight" not in tensors
    tensor = tensors["blk.1.ffn_up.weight"]
    content = bytearray(file.read_bytes())
    content[tensor.start + 2] ^= 0x10
    file.write_bytes(content)
    changed = [difference for difference in compare_gguf(file, checkpoint) if difference.largest > difference.allowed]
    assert [difference.name for difference in changed] == ["blk.1.ffn_up.weight"]


def test_metadata_match_config_and_tokenizer(tmp_path: Path) -> None:
    write_gguf(save_mergeable_llama(tmp_path / "source"), tmp_path / "tiny.gguf")
    fields = GGUFReader(tmp_path / "tiny.gguf").fields
    values = {key: fields[key].contents() for key in fields}
    expected = {"general.architecture": "llama", "llama.context_length": 256, "llama.embedding_length": 64,
        "llama.block_count": 2, "llama.feed_forward_length": 128, "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2, "llama.attention.key_length": 16, "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 10000.0, "llama.vocab_size": ROWS, "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False, "general.file_type": 1}  # fmt: skip
    assert {key: values[key] for key in expected} == expected
    assert values["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    tokenizer = train_tokenizer()
    assert values["tokenizer.chat_template"] == tokenizer.chat_template
    tokens, types = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    assert tokens[: len(tokenizer)] == tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    mark = tokenizer.convert_tokens_to_ids("<mark>")
    assert (types[1], types[100], types[mark], types[ROWS - 1]) == (3, 1, 4, 5)


def test_llama3_rope_factors_match_transformers(tmp_path: Path) -> None:
    source = save_mergeable_llama(tmp_path / "source", rope_parameters=LLAMA3_ROPE, head_dim=32)
    config = AutoModelForCausalLM.from_pretrained(source.folder).config
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 500.0 ** (-np.arange(0, 32, 2) / 32)
    factors = GgufArchitecture.of(source).rotary_factors()
    assert factors is not None and len(set(factors.tolist())) > 3
    np.testing.assert_allclose(plain / factors, expected.numpy(), rtol=1e-6)
    (planned,) = (candidate for candidate in plan_gguf(source) if candidate.name == "rope_freqs.weight")
    assert planned.shape == (16,)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu'"),
        ({"model_type": "mistral", "sliding_window": 16}, "sliding_window: 16"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "rope_type: 'dynamic'"),
        ({"num_hidden_layers": 3}, "lacks model.layers.2"),
        ({"num_hidden_layers": 1}, "has model.layers.1"),
    ],
)
def test_unsupported_configs_are_refused_before_writing(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    source = save_mergeable_llama(tmp_path / "source")
    config = json.loads((source.folder / "config.json").read_text())
    (source.folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ModelError, match=words):
        write_gguf(Checkpoint(source.folder), tmp_path / "tiny.gguf")
    assert not (tmp_path / "tiny.gguf").exists()


def test_group_size_below_32_is_refused_with_the_layer_name(tmp_path: Path) -> None:
    checkpoint = quantized_llama(tmp_path, group_size=16)
    with pytest.raises(ModelError, match="Groups of 16") as caught:
        write_gguf(checkpoint, tmp_path / "tiny.gguf")
    assert caught.value.where is not None and caught.value.where.startswith("model.embed_tokens")


def test_values_beyond_float16_are_refused(tmp_path: Path) -> None:
    source = save_mergeable_llama(tmp_path / "source")
    tensors = load_file(source.folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e6
    save_file(tensors, source.folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"up_proj.weight' holds values beyond float16") as caught:
        write_gguf(source, tmp_path / "tiny.gguf")
    assert "float_type: f32" in str(caught.value)


def test_companions_load_in_transformers_without_quantization_config(tmp_path: Path) -> None:
    checkpoint = quantized_llama(tmp_path)
    (tmp_path / "beside").mkdir()
    write_companions(checkpoint, tmp_path / "beside")
    assert "quantization_config" not in json.loads((tmp_path / "beside" / "config.json").read_text())
    from transformers import AutoTokenizer

    beside = AutoTokenizer.from_pretrained(tmp_path / "beside")
    assert beside("the cat's 12")["input_ids"] == train_tokenizer()("the cat's 12")["input_ids"]
    assert beside.chat_template == train_tokenizer().chat_template


FAMILIES = (
    *("gemma2", "gemma3", "phi3", "gpt2", "gpt_neox", "falcon-new", "bloom", "stablelm2", "granitemoe", "gpt_oss"),
    *("deepseek_v3", "lfm2_moe", "mamba2", "jamba", "qwen3_next"),
)


@pytest.mark.parametrize("name", FAMILIES)
def test_llama_cpp_logits_match_transformers(name: str, tmp_path: Path) -> None:
    equal, report = judge(name, tmp_path / "model")
    assert equal, report


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("llama", {"model_type": "phimoe"}, "'phimoe' cannot be written as GGUF here: llama.cpp sends tokens"),
        ("llama", {"model_type": "opt"}, "'opt' cannot be written as GGUF here"),
        ("gemma2", {"query_pre_attn_scalar": 24}, "query_pre_attn_scalar: 24"),
        ("olmoe", {"norm_topk_prob": True}, "norm_topk_prob: True"),
        ("starcoder2", {"sliding_window": 6}, "sliding_window: 6"),
        ("granitemoehybrid", {"num_local_experts": 0}, "num_local_experts: 0"),
        ("smollm3", {"no_rope_layers": [1, 0]}, r"no_rope_layers: \[1, 0\]"),
    ],
)
def test_architectures_unsupported_by_llama_cpp_are_refused(
    name: str, changes: dict[str, object], words: str, tmp_path: Path
) -> None:
    tiny_decoders.save(name, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ModelError, match=words):
        check_writable(tmp_path)


def test_pruned_heads_are_exported_if_config_can_express_them(tmp_path: Path) -> None:
    model = tiny_decoders.save("llama", tmp_path)
    keep_heads(model, [[1], [0]])
    model.save_pretrained(tmp_path)
    planned = {tensor.name: tensor.shape for tensor in plan_gguf(Checkpoint(tmp_path))}
    assert planned["blk.1.attn_q.weight"] == (32, 64) and planned["blk.1.attn_k.weight"] == (16, 64)
    other = tiny_decoders.save("gpt2", tmp_path)
    keep_heads(other, [[1], [0]])
    other.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="was pruned in a way that neither its config nor GGUF can express"):
        check_writable(tmp_path)


def test_tensor_without_gguf_name_is_refused(tmp_path: Path) -> None:
    tiny_decoders.save("gpt2", tmp_path)

    def planned_with(name: str) -> int:
        tensors = load_file(tmp_path / "model.safetensors")
        tensors[name] = tensors["transformer.wpe.weight"].clone()
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        return len(plan_gguf(Checkpoint(tmp_path)))

    assert planned_with("transformer.h.0.attn.bias") == 28
    with pytest.raises(ModelError, match=r"has transformer\.h\.0\.extra"):
        planned_with("transformer.h.0.extra.weight")
