"""Tests of inputs with which no language model can be quantized: the error states cause, location and remedy.

Each error comes from `compress run`, before any stage finishes and without partial output.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_generation
import tiny_run
from quantized import VOCABULARY, tiny_tokenizer
from safetensors.torch import load_file, save_file
from transformers import MiniMaxConfig, MiniMaxForCausalLM

from compress.pipeline.run import run

pytestmark = pytest.mark.slow

Refuse = Callable[..., str]
GPTQ: dict[str, Any] = {"bits": 4, "group_size": 32, "samples": 4, "sequence_length": 16, "embedding_bits": 4}
RECOVERY: dict[str, Any] = {"steps": 4, "batch_size": 2, "sequence_length": 32, "validation_windows": 2}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pristine")
    tiny_generation.write_all(folder)
    return folder


def with_gptq(place: Path, *stages: Any, **changes: Any) -> None:
    """Write a recipe with a gptq stage that has the options ``changes``, followed by ``stages``."""
    tiny_generation.write_recipe(place, stages=[{"gptq": {**GPTQ, **changes}}, *stages])


def write_train(place: Path, text: str) -> None:
    (place / "train.jsonl").write_text(json.dumps({"text": text}) + "\n")


def change_config(place: Path, **changes: Any) -> None:
    path = place / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def short_text(place: Path) -> None:
    with_gptq(place)
    write_train(place, "some words")


def text_of_one_repeated_token(place: Path) -> None:
    with_gptq(place)
    write_train(place, "a" * 2000)


def text_too_short_for_a_later_stage(place: Path) -> None:
    with_gptq(place, {"tune_scales": RECOVERY})
    write_train(place, "and then some words " * 5)


def too_many_steps_in_a_later_stage(place: Path) -> None:
    with_gptq(place, {"lora_recovery": {**RECOVERY, "steps": 900_000}})


def fields_of_another_task(place: Path) -> None:
    with_gptq(place, {"onnx": {"opset": 18}})


def tied_head_excluded_from_quantization(place: Path) -> None:
    with_gptq(place, keep=["lm_head"])


def different_tensors_for_tied_head(place: Path) -> None:
    with_gptq(place)
    path = place / "model" / "model.safetensors"
    tensors = load_file(path)
    table = tensors["model.embed_tokens.weight"]
    save_file({**tensors, "lm_head.weight": table + 1}, path, metadata={"format": "pt"})


def untied_model_without_head_tensor(place: Path) -> None:
    with_gptq(place)
    change_config(place, tie_word_embeddings=False)


def embedding_table_of_another_size(place: Path) -> None:
    with_gptq(place)
    change_config(place, vocab_size=192)


def model_that_is_no_decoder(place: Path) -> None:
    with_gptq(place)
    shutil.rmtree(place / "model")
    tiny_run.write_model(place / "model")


REFUSED: list[tuple[Callable[[Path], None], int, tuple[str, ...]]] = [
    (short_text, 2, ("calibration text is too short", "data.splits.train", "4 windows, 64 tokens", "samples")),
    (text_of_one_repeated_token, 2, ("one token 'a'", "data.splits.train", "ordinary text")),
    (text_too_short_for_a_later_stage, 2, ("too short: 1 windows of 32", "data.splits", "lower sequence_length")),
    (too_many_steps_in_a_later_stage, 2, ("900000 steps", "lower steps")),
    (
        fields_of_another_task,
        2,
        ("tiny.yaml:", "stages.1.onnx.opset: found 18", "expected nothing: it does not apply to text-generation"),
    ),
    (tied_head_excluded_from_quantization, 2, ("lm_head has the weights of model.embed_tokens", "embedding_bits: 16")),
    (different_tensors_for_tied_head, 2, ("two different tensors", "tie_word_embeddings: false")),
    (untied_model_without_head_tensor, 2, ("no 'lm_head.weight'", "tie_word_embeddings: true")),
    (embedding_table_of_another_size, 2, ("[160, 64]", "[192, 64]", "same model")),
    (model_that_is_no_decoder, 2, ("no tensor 'bert.", "architecture that config.json names")),
]


@pytest.mark.parametrize(("spoil", "code", "words"), REFUSED, ids=[spoil.__name__ for spoil, _, _ in REFUSED])
def test_run_rejects_invalid_language_model_input(
    place: Path, refuse: Refuse, spoil: Callable[[Path], None], code: int, words: tuple[str, ...]
) -> None:
    spoil(place)
    errors = refuse("run", "tiny.yaml", code=code)
    for word in words:
        assert word in errors, errors
    assert "expected" in errors or "hint:" in errors


def test_model_that_no_target_can_run_is_still_quantized(place: Path) -> None:
    """The cpu target is skipped with a reason, the torch target stands in for it, and the checkpoint is shipped."""
    shutil.rmtree(place / "model")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    kinds = {"layer_types": ["full_attention"] * 2, "num_local_experts": 2, "num_experts_per_tok": 1}
    config = MiniMaxConfig(**sizes, **kinds, vocab_size=VOCABULARY, head_dim=16, num_key_value_heads=2)
    MiniMaxForCausalLM(config).save_pretrained(place / "model")
    tiny_tokenizer().save_pretrained(place / "model")
    # One launch starts torch in three processes; the budget of 1 s allows a single launch.
    benchmark = {"threads": 1, "budget_seconds": 1, "contexts": [16], "tokens": 4, "every_stage": False}
    tiny_generation.write_recipe(place, stages=[{"gptq": GPTQ}], benchmark=benchmark)
    done = run(tiny_run.load(place / "tiny.yaml"), place, place / "artifacts", tiny_run.Notes())
    (skip,) = done.report.skipped
    assert skip.target == "cpu" and "MiniMaxForCausalLM cannot be written as an ONNX decoder" in skip.reason
    assert done.report.stand_in == "torch" and done.report.ran_on == ("torch",)
    assert (done.folder / "model" / "quantize_config.json").is_file()
