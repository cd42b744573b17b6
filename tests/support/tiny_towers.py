"""Tiny CLIP and SigLIP models, and images with captions that name the bright half."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import tiny_images
import torch
from tiny_run import PLAIN
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast, SiglipConfig, SiglipModel

WORDS = ("<pad>", "<start>", "<end>", "<unk>", ".", *PLAIN, "This", "is", "a", "photo", "of", "it", "as")
SHOWN = ("bright", "dark", "above", "below")
TEMPLATES = ("a photo of {}", "{} as it is")


def words(names: Sequence[str] = ("input_ids", "attention_mask")) -> PreTrainedTokenizerFast:
    """Return a word tokenizer with start and end tokens, as in CLIP, whose outputs have these ``names``."""
    table = {word: index for index, word in enumerate((*WORDS, *SHOWN))}
    tokenizer = Tokenizer(WordLevel(table, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", table["<start>"]), ("<end>", table["<end>"])]
    )
    special = {"bos_token": "<start>", "eos_token": "<end>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=64, model_input_names=list(names), **special
    )


def module(kind: str, **changes: Any) -> Any:
    """Return a CLIP or SigLIP with two layers in each tower."""
    tokenizer = words()
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    text = {**shape, "vocab_size": len(tokenizer), "projection_dim": 24, "max_position_embeddings": 64, **changes}
    text |= {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    image = {**shape, "image_size": tiny_images.SIDE, "patch_size": 8, "projection_dim": 24, **changes}
    torch.manual_seed(0)
    if kind == "clip":
        return tiny_images.shaken(CLIPModel(CLIPConfig(text_config=text, vision_config=image, projection_dim=24)))
    return tiny_images.shaken(SiglipModel(SiglipConfig(text_config=text, vision_config=image)))


def write_model(folder: Path, kind: str = "clip", **changes: Any) -> None:
    """Write the model with its tokenizer and image processor, in the layout of the Hub."""
    folder.mkdir(parents=True, exist_ok=True)
    module(kind, **changes).save_pretrained(folder)
    # SigLIP's tokenizers on the Hub have no attention mask either.
    (words() if kind == "clip" else words(["input_ids"])).save_pretrained(folder)
    tiny_images.processor().save_pretrained(folder)


def table(count: int, seed: int = 0) -> pa.Table:
    """Return ``count`` rows of image, caption and label."""
    rows = tiny_images.table(count, seed)
    names = [f"bright {label}" for label in rows["label"].to_pylist()]
    texts = [TEMPLATES[row // 2 % len(TEMPLATES)].format(name) for row, name in enumerate(names)]
    return pa.table({"image": rows["image"], "text": texts, "label": names})


def write_splits(folder: Path) -> dict[str, str]:
    """Write rows of three splits; return the splits as a recipe names them."""
    return tiny_images.write_rows(folder, table, {"train": 40, "validation": 16, "test": 24})
