"""GGUF files of several families, against transformers on the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_decoders
from gguf_families import judge

from compress.formats.gguf.architecture import check_writable
from compress.formats.gguf.export import plan_gguf
from compress.models.checkpoint import Checkpoint
from compress.models.transformer_pruning import keep_heads
from compress.utils.errors import ModelError

FAMILIES = (
    *("gemma2", "gemma3", "phi3", "gpt2", "gpt_neox", "falcon-new", "bloom", "stablelm2", "granitemoe", "gpt_oss"),
    *("deepseek_v3", "lfm2_moe", "mamba2", "jamba", "qwen3_next"),
)


@pytest.mark.parametrize("name", FAMILIES)
def test_llama_cpp_answers_as_transformers(name: str, tmp_path: Path) -> None:
    equal, said = judge(name, tmp_path / "model")
    assert equal, said


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("llama", {"model_type": "phimoe"}, "'phimoe' cannot be written as GGUF here: llama.cpp sends tokens"),
        ("llama", {"model_type": "opt"}, "'opt' cannot be written as GGUF here"),
        ("llama", {"hidden_act": "relu"}, "hidden_act: 'relu'"),
        ("gemma2", {"query_pre_attn_scalar": 24}, "query_pre_attn_scalar: 24"),
        ("olmoe", {"norm_topk_prob": True}, "norm_topk_prob: True"),
        ("starcoder2", {"sliding_window": 6}, "sliding_window: 6"),
        ("granitemoehybrid", {"num_local_experts": 0}, "num_local_experts: 0"),
        ("smollm3", {"no_rope_layers": [1, 0]}, r"no_rope_layers: \[1, 0\]"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(
    name: str, changes: dict[str, object], words: str, tmp_path: Path
) -> None:
    import json

    tiny_decoders.save(name, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ModelError, match=words):
        check_writable(tmp_path)


def test_heads_that_the_config_says_are_cut_in_the_file_too(tmp_path: Path) -> None:
    model = tiny_decoders.save("llama", tmp_path)
    keep_heads(model, [[1], [0]])
    model.save_pretrained(tmp_path)
    planned = {tensor.name: tensor.shape for tensor in plan_gguf(Checkpoint(tmp_path))}
    assert planned["blk.1.attn_q.weight"] == (32, 64) and planned["blk.1.attn_k.weight"] == (16, 64)
    other = tiny_decoders.save("gpt2", tmp_path)
    keep_heads(other, [[1], [0]])
    other.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="were cut in a way that its own config has no words for"):
        check_writable(tmp_path)


def test_a_tensor_that_the_file_has_no_place_for_is_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tiny_decoders.save("gpt2", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["transformer.h.0.attn.bias"] = tensors["transformer.wpe.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert len(plan_gguf(Checkpoint(tmp_path))) == 28
    tensors["transformer.h.0.extra.weight"] = tensors["transformer.wpe.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"has transformer\.h\.0\.extra"):
        plan_gguf(Checkpoint(tmp_path))
