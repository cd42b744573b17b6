"""A tiny T5 and a tiny BART with random weights, saved to folders, and their character tokenizer."""

from __future__ import annotations

import json
import string
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from tiny import two_sides
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

PAD, END = 0, 1
WORDS = ("lo", "the king", "went up", "to", "his house", "and", "spake unto", "them")


def save_tiny_t5(folder: Path, seed: int = 0) -> Path:
    """Save a T5 with two encoder and two decoder layers.

    Its weights are large enough for outputs to differ between inputs, and for some outputs to end.
    """
    torch.manual_seed(seed)
    tokenizer = letters()
    sizes = {"vocab_size": len(tokenizer), "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2}
    positions = {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 12}
    config = T5Config(**sizes, **positions, decoder_start_token_id=PAD, pad_token_id=PAD, eos_token_id=END)
    return _spread(T5ForConditionalGeneration(config), tokenizer, folder)


def save_tiny_bart(folder: Path, seed: int = 0) -> Path:
    """Save a BART with one encoder and one decoder layer, which is faster to trace."""
    torch.manual_seed(seed)
    tokenizer = letters()
    tokens = {"decoder_start_token_id": END, "eos_token_id": END, "pad_token_id": PAD}
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 64, **two_sides(32, layers=1)}
    config = BartConfig(**sizes, **tokens, bos_token_id=END, forced_eos_token_id=None)
    _spread(BartForConditionalGeneration(config), tokenizer, folder)
    (folder / "generation_config.json").write_text(json.dumps(tokens | {"max_length": 24, "num_beams": 2}))
    return folder


def pairs(count: int, seed: int = 0) -> pa.Table:
    """Return rows of four phrases and of the same phrases in reverse order."""
    drawn = np.random.default_rng(seed).choice(WORDS, (count, 4))
    return pa.table({"text": [" ".join(row) for row in drawn], "target": [" ".join(row[::-1]) for row in drawn]})


def write_pairs(folder: Path) -> dict[str, str]:
    """Write pairs as JSONL files and return the file name of each split."""
    splits = {"train": 48, "validation": 6, "test": 8}
    for name, count in splits.items():
        rows = pairs(count, seed=count).to_pylist()
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {name: f"{name}.jsonl" for name in splits}


def _spread(module: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    with torch.no_grad():
        for parameter in module.eval().parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.4 + (parameter == 1))
    module.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def letters() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token for each printable character."""
    words = ["<pad>", "</s>", "<unk>", *string.printable[:-5]]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", END)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
