"""Tests of decoders and vision-language models in transformers.js: generated tokens are compared with transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_questions
import torch
from quantized import quantize_tiny_llama
from transformers_js_page import ask_page, run_node
from written_decoders import CONFIGS, by_transformers, save_decoder

from compress.formats.onnx.decoder import GraphSettings, export_decoder, export_image_reader
from compress.models.checkpoint import Checkpoint
from compress.tasks.evaluation import Evaluation
from compress.tasks.image_text_to_text import TASK

TEXTS = ("Thecatsat,12times.", "onamat", "x", "42=6*7", "Zebra?", "quick")
NEW_TOKENS = 24


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "quantized", "expand_on_load"),
    [
        ("llama", False, False),
        ("llama", True, False),
        ("mistral", True, True),
        ("qwen2", False, False),
        ("qwen3", True, False),
        ("qwen3", True, True),
    ],
)
def test_greedy_tokens_match_transformers(
    library: Path, name: str, quantized: bool, expand_on_load: bool, tmp_path: Path
) -> None:
    source, weights, folder = written(name, quantized, tmp_path, expand_on_load)
    location, dtype = folder.resolve(), "q4" if quantized else "fp32"
    arguments = (library, location.parent, location.name, dtype, json.dumps(TEXTS), str(NEW_TOKENS))
    assert_tokens_of_transformers(run_node("generate.mjs", *arguments), folder, source, weights)


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.parametrize(
    ("name", "quantized", "expand_on_load"), [("llama", True, False), ("llama", True, True), ("qwen3", False, False)]
)
def test_page_with_webassembly_generates_the_same_tokens(
    library: Path, chromium: str, name: str, quantized: bool, expand_on_load: bool, tmp_path: Path
) -> None:
    source, weights, folder = written(name, quantized, tmp_path, expand_on_load)
    dtype = "q4" if quantized else "fp32"
    assert_tokens_of_transformers(
        ask_page(library, chromium, folder, "generate", dtype, TEXTS, NEW_TOKENS), folder, source, weights
    )


def written(
    name: str, quantized: bool, place: Path, expand_on_load: bool
) -> tuple[Checkpoint, Checkpoint | None, Path]:
    """Return a tiny decoder, its quantized weights if requested, and its ONNX folder."""
    source = save_decoder(place / "source", CONFIGS[name])
    weights = quantize_tiny_llama(source, place / "quantized") if quantized else None
    folder = place / "out"
    folder.mkdir()
    export_decoder(weights or source, GraphSettings(accuracy_level=1, expand_on_load=expand_on_load)).save(folder)
    return source, weights, folder


def assert_tokens_of_transformers(
    answers: list[dict[str, list[int]]], folder: Path, source: Checkpoint, weights: Checkpoint | None
) -> None:
    """Check that prompts and continuations match those of transformers."""
    from transformers import AutoTokenizer

    tokenizer, module, seen = AutoTokenizer.from_pretrained(folder), by_transformers(source, weights), set()
    for text, answer in zip(TEXTS, answers, strict=True):
        prompt = tokenizer(text).input_ids
        ids = torch.tensor([prompt])
        whole = module.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW_TOKENS)
        assert answer == {"prompt": prompt, "whole": whole[0].tolist()}
        seen |= set(answer["whole"][len(prompt) :])
    assert len(seen) > 6, "a model that repeats itself proves little"


ROWS, TRANSFORMERS_NEW_TOKENS = 4, 8


@pytest.mark.slow
def test_vision_language_tokens_match_transformers(library: Path, tmp_path: Path) -> None:
    source = tiny_questions.write_model(tmp_path / "source")
    model = TASK.load(source, None, trust_remote_code=False)
    examples = TASK.eval_examples(tiny_questions.table(ROWS, seed=3), model.processor, None, 64, Evaluation())
    taught = TASK.encode(tiny_questions.table(2), model.processor, None, 64)
    (tmp_path / "out").mkdir()
    export_image_reader(Checkpoint(source), taught, GraphSettings(), 1e-4).model.save(tmp_path / "out")
    batches = [examples.batch([row]) for row in range(ROWS)]
    jobs = [
        {
            "ids": batch["input_ids"][0].tolist(),
            "pixels": batch["pixel_values"].ravel().tolist(),
            "dims": list(batch["pixel_values"].shape),
        }
        for batch in batches
    ]
    arguments = (library, tmp_path, "out", "fp32", json.dumps(jobs), str(TRANSFORMERS_NEW_TOKENS))
    answers = run_node("tell_of_image.mjs", *arguments)
    for batch, answer in zip(batches, answers, strict=True):
        given = {name: torch.from_numpy(array) for name, array in batch.items()}
        with torch.inference_mode():
            generated = model.module.generate(**given, do_sample=False, max_new_tokens=TRANSFORMERS_NEW_TOKENS)
        assert answer == generated[0].tolist()
