"""A tiny Whisper with random weights, saved to a folder with its feature extractor and tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tiny import two_sides
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

START, END = 256, 257
FRAMES = 100
"""Frames in one second of audio, with a hop of 10 ms."""


def write_tiny_whisper(folder: Path, seed: int = 0, spread: float = 0.3) -> Path:
    """Write a Whisper with two encoder and two decoder layers, 258 tokens (bytes, start, end) and one second of audio.

    Its weights have a large ``spread``, so that different inputs have different outputs.
    """
    torch.manual_seed(seed)
    sizes = {"vocab_size": 258, "num_mel_bins": 8, "max_source_positions": FRAMES // 2, "max_target_positions": 32}
    tokens = {"decoder_start_token_id": START, **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), END)}
    nothing = {"suppress_tokens": None, "begin_suppress_tokens": None}
    config = WhisperConfig(**two_sides(64, hidden=128), **sizes, init_std=spread, **tokens, **nothing)
    module = WhisperForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith(".bias") and "layer_norm" not in name:
                parameter.normal_(0, spread)
    module.generation_config.update(max_length=24, suppress_tokens=[], begin_suppress_tokens=[END])
    module.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=8, chunk_length=1).save_pretrained(folder)
    write_byte_tokenizer(folder)
    return folder


def write_byte_tokenizer(folder: Path) -> None:
    """Write a tokenizer of the 256 bytes, followed by the start and end tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True) for text in ("<|startoftranscript|>", "<|endoftext|>")]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), "<|endoftext|>")
    settings = {"tokenizer_class": "WhisperTokenizer", **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
