"""Tiny GGUF files, written by the `gguf` package."""

from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize


def write_tensors(path: Path) -> dict[str, np.ndarray]:
    """Write a file with an F32 tensor [64] and a Q8_0 tensor [3, 64], and return the values before quantization."""
    writer = GGUFWriter(path, "llama")
    writer.add_array("tokenizer.ggml.tokens", ["a", "bc", "def"])
    writer.add_array("tokenizer.ggml.scores", [0.0, 1.0, 2.0])
    values = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)
    writer.add_tensor("blk.0.attn_norm.weight", values[0])
    writer.add_tensor(
        "blk.0.ffn_up.weight", quantize(values, GGMLQuantizationType.Q8_0), raw_dtype=GGMLQuantizationType.Q8_0
    )
    _close(writer)
    return {"blk.0.attn_norm.weight": values[0], "blk.0.ffn_up.weight": values}


def write_llama(path: Path, more: tuple[str, ...] = (), pre: str | None = None) -> dict[str, np.ndarray]:
    """Write a tied one-layer Llama with hidden size 32 and one head, and return its fp32 values.

    ``more`` are tokens beyond those of the alphabet; ``pre`` is the name of the pre-tokenizer.
    """
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    tokens = ["<s>", "</s>", "<|endoftext|>", *"abcdefghijkl", "ab", "cd", *more]
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3, *[1] * (len(tokens) - 3)])
    writer.add_token_merges(["a b", "c d", *(f"{token[0]} {token[1:]}" for token in more if len(token) == 2)])
    if pre:
        writer.add_tokenizer_pre(pre)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    random = np.random.default_rng(1)
    shapes = {
        "token_embd.weight": (len(tokens), 32),
        "output_norm.weight": (32,),
        "blk.0.attn_norm.weight": (32,),
        "blk.0.attn_q.weight": (32, 32),
        "blk.0.attn_k.weight": (32, 32),
        "blk.0.attn_v.weight": (32, 32),
        "blk.0.attn_output.weight": (32, 32),
        "blk.0.ffn_norm.weight": (32,),
        "blk.0.ffn_gate.weight": (64, 32),
        "blk.0.ffn_up.weight": (64, 32),
        "blk.0.ffn_down.weight": (32, 64),
    }
    values = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    for name, array in values.items():
        writer.add_tensor(name, array)
    _close(writer)
    return values


def _close(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
