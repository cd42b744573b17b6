"""Tests of decoder folders in onnxruntime-genai: generated tokens are compared with transformers."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
from mergeable import TEXTS, save_mergeable_llama, train_tokenizer
from quantized import quantize_tiny_llama
from written_decoders import CONFIGS, by_transformers, save_decoder

from compress.formats.onnx.decoder import GraphSettings, export_decoder
from compress.models.checkpoint import Checkpoint

genai = pytest.importorskip("onnxruntime_genai")
PROMPTS = ([7, 40, 3, 99, 120], [150], [61, 60], [9, 9, 9, 14], [88], [33, 101, 5, 6, 77, 12, 140])
NEW_TOKENS = 24
EOS = 2


def generate(folder: Path, prompt: list[int]) -> list[int]:
    """Return greedily generated tokens."""
    model = genai.Model(str(folder))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(do_sample=False, max_length=len(prompt) + NEW_TOKENS, min_length=0)
    generator = genai.Generator(model, parameters)
    generator.append_tokens([prompt])
    while not generator.is_done():
        generator.generate_next_token()
    token_ids: list[int] = list(generator.get_sequence(0))
    return token_ids[len(prompt) :]


def expected(source: Checkpoint, prompt: list[int], weights: Checkpoint | None = None) -> list[int]:
    import torch

    module = by_transformers(source, weights)
    ids = torch.tensor([prompt])
    whole = module.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW_TOKENS)
    tokens: list[int] = whole[0, len(prompt) :].tolist()
    # onnxruntime-genai does not return the end-of-sequence token.
    return tokens[:-1] if tokens[-1] == EOS else tokens


CASES = [("llama", False), ("llama", True), ("mistral", True), ("qwen2", False), ("qwen3", True)]


@pytest.mark.parametrize(("name", "quantized"), CASES)
def test_greedy_tokens_match_transformers(name: str, quantized: bool, tmp_path: Path) -> None:
    source = save_decoder(tmp_path / "source", CONFIGS[name])
    weights = quantize_tiny_llama(source, tmp_path / "quantized") if quantized else None
    folder = tmp_path / "out"
    folder.mkdir()
    export_decoder(weights or source, GraphSettings(accuracy_level=1)).save(folder)
    seen: set[int] = set()
    for prompt in PROMPTS:
        tokens = expected(source, prompt, weights)
        assert generate(folder, prompt) == tokens
        seen |= set(tokens)
    assert len(seen) > 6, "a model that repeats itself proves little"


def test_tokenizer_gives_the_ids_of_transformers(tmp_path: Path) -> None:
    source = save_decoder(tmp_path / "source", CONFIGS["llama"])
    folder = tmp_path / "out"
    folder.mkdir()
    export_decoder(source).save(folder)
    tokenizer = genai.Tokenizer(genai.Model(str(folder)))
    from transformers import AutoTokenizer

    text = "Thecatsat,12times,onamat."
    ids = AutoTokenizer.from_pretrained(folder)(text).input_ids
    assert list(tokenizer.encode(text)) == ids
    assert tokenizer.decode(ids) == text
    assert json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]["filename"] == "onnx/model.onnx"


def test_ids_differ_only_where_white_space_precedes_a_digit(tmp_path: Path) -> None:
    """SmolLM2's tokenizer splits digits before it splits words; onnxruntime-genai 0.18 does both in one step."""
    export_decoder(save_mergeable_llama(tmp_path / "source", rule="smollm")).save(tmp_path)
    theirs, ours = genai.Tokenizer(genai.Model(str(tmp_path))), train_tokenizer("smollm")
    chance = random.Random(0)
    parts = [*" ".join(TEXTS).split(), *"0123456789.,;-'", " ", " ", "  ", "\t", "\n", "\n\n", "é", "東", "👍🏽"]
    lines = ["".join(chance.choices(parts, k=12)) for _ in range(2000)]
    wrong = [line for line in lines if list(theirs.encode(line)) != ours(line).input_ids]
    known = [line for line in lines if re.search(r"\s\s\d", line)]
    assert len(lines) - len(known) > 1000 and set(wrong) <= set(known)
    # Once this fails, the sentence in docs/guides/language-model-runtimes.md can go.
    assert list(theirs.encode("cats;  1")) != ours("cats;  1").input_ids
