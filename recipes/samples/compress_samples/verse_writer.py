"""A small T5 with random weights, and a tokenizer trained on two Bible translations."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from compress.utils.progress import Progress
from compress_samples.verses import MODERN, OLD, read_verses

_PIECES = 2048
_PAD, _END, _UNKNOWN = "<pad>", "</s>", "<unk>"
_LONGEST = 64
_SEED = 0


def write_model(members: Path, files: Path, progress: Progress) -> None:
    """Write a model folder with random weights (fixed seed) and a BPE tokenizer trained on both translations."""
    texts = [text for folder, order in (MODERN, OLD) for _, text in read_verses(members / folder, order) if text]
    tokenizer = _tokenizer(texts)
    torch.manual_seed(_SEED)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=128,
        d_kv=32,
        d_ff=384,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=16,
        relative_attention_max_distance=64,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    module = T5ForConditionalGeneration(config)
    module.save_pretrained(files)
    tokenizer.save_pretrained(files)
    rules = {"decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0, "max_length": _LONGEST}
    (files / "generation_config.json").write_text(json.dumps(rules) + "\n", encoding="utf-8")
    total = sum(parameter.numel() for parameter in module.parameters())
    progress.note(
        f"verse-writer: {total:,} random weights, {len(tokenizer):,} pieces of words of {len(texts):,} verses"
    )


def _tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(unk_token=_UNKNOWN))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=_PIECES, special_tokens=[_PAD, _END, _UNKNOWN], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    end = tokenizer.token_to_id(_END)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {_END}", special_tokens=[(_END, end)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=_PAD,
        eos_token=_END,
        unk_token=_UNKNOWN,
        clean_up_tokenization_spaces=False,
    )
