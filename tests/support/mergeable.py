"""BPE tokenizers with merges, trained on a few sentences, for clients that require merges."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from quantized import save_tiny_llama
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from compress.formats.gguf.tokenizer import SPLITS
from compress.models.checkpoint import Checkpoint

ROWS = 352
"""Rows of the embedding, a few more than the tokenizer has tokens."""
SPECIAL = ("<unk>", "<s>", "</s>")
TEXTS = (
    "The cat sat on the mat, and the cat's hat sat on the cat.",
    "In 1984 there were 12345 cats; they'd eaten 67 mats.\n\nThat's what they'll say!",
    "  Two spaces, a\ttab and 3.14 --- naïve café, 東京, Ωmega.",
    "def cat(x):\n    return x + 1  # the mat",
)
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def splitter(rule: str) -> pre_tokenizers.PreTokenizer:
    """Return the pre-tokenizer that llama.cpp calls ``rule``, as a tokenizer.json of such a model defines it."""
    if rule == "gpt-2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if rule == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    patterns = next(patterns for patterns, name in SPLITS.items() if name == rule)
    steps = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def train_tokenizer(rule: str = "smollm") -> PreTrainedTokenizerFast:
    """Train a tokenizer of at most 340 tokens; <s> and </s> are special, <mark> is an ordinary added token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = splitter(rule)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.add_tokens(["<mark>"])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    fast.chat_template = "{% for message in messages %}<s>{{ message['content'] }}</s>{% endfor %}"
    return fast


def train_sentence_piece(prefix: bool = True) -> PreTrainedTokenizerFast:
    """Train a BPE tokenizer of at most 340 tokens with byte fallback and visible spaces, as in Llama 2 and Gemma."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    shown = [normalizers.Replace(" ", "\u2581")]
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), *shown] if prefix else shown)
    special = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = content["added_tokens"][: len(SPECIAL)]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)), unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def save_mergeable_llama(folder: Path, seed: int = 0, rule: str = "smollm", **changes: Any) -> Checkpoint:
    """Save `quantized.save_tiny_llama` with a trained tokenizer and an embedding row for each of its tokens."""
    model_folder = save_tiny_llama(folder, seed, vocab_size=ROWS, **changes)
    train_tokenizer(rule).save_pretrained(folder)
    return model_folder


def save_qwen(folder: Path, kind: str, head_size: int = 128) -> Checkpoint:
    """Save an untied Qwen2 with biases, or a tied Qwen3 with norms of the attention heads."""
    sizes = {"vocab_size": ROWS, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    torch.manual_seed(3)
    if kind == "qwen2":
        model: Any = Qwen2ForCausalLM(Qwen2Config(**sizes, tie_word_embeddings=False))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=head_size, tie_word_embeddings=True))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(mean=float("norm" in name), std=0.2)
    model.save_pretrained(folder)
    train_tokenizer("qwen2").save_pretrained(folder)
    return Checkpoint(folder)
