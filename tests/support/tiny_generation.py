"""A tiny text generation recipe: a two-layer Llama in a folder, texts as JSONL, and the recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import stage_context
from quantized import save_tiny_llama

WORDS = ("some", "words", "of", "no", "meaning", "that", "stand", "in", "a", "row", "and", "then", "in", "another")
SPLITS = {"train": 12, "test": 4}
STAGES: tuple[dict[str, Any], ...] = (
    {"gptq": {"bits": 4, "group_size": 32, "samples": 4, "sequence_length": 16, "embedding_bits": 4}},
    {"onnx": {"rounding_limit": 0.5}},
)


BENCHMARK: dict[str, Any] = {"threads": 1, "seconds": 0.1, "launches": 2, "contexts": [16], "tokens": 4}
BENCHMARK["every_stage"] = False
ONE_LAUNCH = BENCHMARK | {"budget_seconds": 0.1}
"""One launch per model, for tests that need a timing but not a precise one."""


def write_texts(folder: Path, words: int = 60) -> None:
    """Write ``train.jsonl`` and ``test.jsonl`` with one text per row; each letter is a token of the tiny tokenizer."""
    chance = np.random.default_rng(0)
    for split, count in SPLITS.items():
        lines = [json.dumps({"text": " ".join(chance.choice(WORDS, words))}) for _ in range(count)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")


def write_recipe(folder: Path, name: str = "tiny", **changes: Any) -> Path:
    """Write a recipe for ``model/`` and the texts in ``folder``; ``changes`` replace its top-level fields."""
    fields = {
        "stages": STAGES,
        "max_length": 32,
        "evaluation": {"windows": 6, "prompts": 2, "prompt_tokens": 8, "tokens": 12},
        "benchmark": BENCHMARK,
        **changes,
    }
    return stage_context.write_recipe(folder, "text-generation", (*SPLITS,), fields.pop("stages"), name, **fields)


def write_all(folder: Path, **changes: Any) -> Path:
    """Write model, texts and recipe into ``folder`` and return the path of the recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    save_tiny_llama(folder / "model")
    write_texts(folder)
    return write_recipe(folder, **changes)
