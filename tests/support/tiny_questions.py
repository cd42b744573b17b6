"""Tiny vision-language models, and images with questions and answers about which half is bright."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import tiny_images
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

IMAGE = "<image>"
WORDS = ("<pad>", "<s>", "</s>", "<unk>", IMAGE, "user", "model", ":", "?", "it", "is", "bright", "above", "below")
WORDS += ("where", "what", "half", "shines", "the", "one")
TEMPLATE = "<s>{% for m in messages %}user :{% for c in m['content'] %}{% if c['type'] == 'image' %} <image>" + (
    "{% else %} {{ c['text'] }}{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %} model :{% endif %}"
)
QUESTIONS = {"where is it bright ?": "it is bright {}", "what half shines ?": "the one {}"}
PATCH = 8


def tokenizer(words: tuple[str, ...] = WORDS) -> PreTrainedTokenizerFast:
    """Return a word tokenizer in which the image token is special."""
    word_tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    word_tokenizer.pre_tokenizer = Whitespace()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=word_tokenizer, extra_special_tokens={"image_token": IMAGE}, **special
    )


def processor(template: str | None = TEMPLATE, **changes: Any) -> LlavaProcessor:
    """Return a LLaVA processor, by default for a CLIP tower whose first token is dropped."""
    fields = {"patch_size": PATCH, "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"}
    return LlavaProcessor(tiny_images.processor(), tokenizer(), chat_template=template, **fields | changes)


def module(text: str = "llama", tower: str = "clip_vision_model", **changes: Any) -> LlavaForConditionalGeneration:
    """Return a LLaVA with one layer in the vision tower and one in the language model."""
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    vision = {**shape, "model_type": tower, "image_size": tiny_images.SIDE, "patch_size": PATCH, "projection_dim": 24}
    words = {"vocab_size": len(WORDS), "num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2}
    written = {**shape, **words, "model_type": text, "pad_token_id": 0, "max_position_embeddings": 64, **changes}
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=vision,
        text_config=written,
        image_token_index=WORDS.index(IMAGE),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default" if tower.startswith("clip") else "full",
    )
    model = tiny_images.shaken(LlavaForConditionalGeneration(config))
    model.generation_config.max_new_tokens = 8
    return model


def write_model(folder: Path, template: str | None = TEMPLATE, **changes: Any) -> Path:
    """Write the model with its tokenizer and processor, in the layout of the Hub."""
    folder.mkdir(parents=True, exist_ok=True)
    model = module(**changes)
    model.save_pretrained(folder)
    whole = model.config.vision_feature_select_strategy == "full"
    counted = {"num_additional_image_tokens": 0, "vision_feature_select_strategy": "full"} if whole else {}
    both = processor(template, **counted)
    both.save_pretrained(folder)
    both.image_processor.save_pretrained(folder)
    return folder


def write_idefics3(folder: Path, splitting: bool = False) -> Path:
    """Write a SmolVLM with one layer in each part, whose connector merges four patches into one feature."""
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    words = (*WORDS, "<fake_token_around_image>", "<global-img>", "<end_of_utterance>")
    text = {**shape, "model_type": "llama", "vocab_size": len(words), "num_key_value_heads": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    config = Idefics3Config(
        vision_config={**shape, "image_size": tiny_images.SIDE, "patch_size": PATCH},
        text_config={**text, "bos_token_id": 1, "pad_token_id": 0, "max_position_embeddings": 64},
        image_token_id=WORDS.index(IMAGE),
        scale_factor=2,
        pad_token_id=0,
    )
    model = tiny_images.shaken(Idefics3ForConditionalGeneration(config))
    model.generation_config.update(max_new_tokens=8, eos_token_id=2)
    model.save_pretrained(folder)
    square = {"longest_edge": tiny_images.SIDE}
    pictures = Idefics3ImageProcessorPil(size=square, max_image_size=square, do_image_splitting=splitting)
    count = (tiny_images.SIDE // PATCH) ** 2 // 4
    both = Idefics3Processor(pictures, tokenizer(words), image_seq_len=count, chat_template=TEMPLATE)
    both.save_pretrained(folder)
    pictures.save_pretrained(folder)
    return folder


def table(count: int, seed: int = 0) -> pa.Table:
    """Return ``count`` rows of image, question, answer, and the question's first word."""
    rows = tiny_images.table(count, seed)
    asked = [list(QUESTIONS)[row // 2 % len(QUESTIONS)] for row in range(count)]
    answers = [QUESTIONS[text].format(label) for text, label in zip(asked, rows["label"].to_pylist(), strict=True)]
    kinds = [text.split()[0] for text in asked]
    return pa.table({"image": rows["image"], "text": asked, "target": answers, "question": kinds})


def write_splits(folder: Path) -> dict[str, str]:
    """Write rows of three splits; return the splits as a recipe names them."""
    return tiny_images.write_rows(folder, table, {"train": 48, "validation": 8, "test": 12})
