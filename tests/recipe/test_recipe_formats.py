"""Tests of format checks in recipes, and of recipes of language models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_generation import write_recipe

from compress.recipe.loading import dump_recipe, read_recipe
from compress.utils.errors import Problem, RecipeError


def problems(folder: Path, stages: list[Any], targets: list[str]) -> list[tuple[str, str, str]]:
    """Return (field, found, expected) of each problem of a recipe whose files need not exist."""
    path = write_recipe(folder, stages=stages, targets=targets)
    try:
        read_recipe(path)
    except RecipeError as error:
        return [(problem.field, problem.found, problem.expected) for problem in error.problems]
    return []


BLOCKS = "a multiple of 32, GGUF's blocks"
NO_ZERO_POINTS = "GGUF has no type for 8 bits with zero points"
SYMMETRIC = f"true: {NO_ZERO_POINTS}"
TABLES = "4, 5 or 16: GGUF has no type for 8 bits with zero points"


@pytest.mark.parametrize(
    ("gptq", "expected"),
    [
        ({"group_size": 16}, ("stages.0.gptq.group_size", "16", BLOCKS)),
        ({"embedding_bits": 4, "embedding_group_size": 16}, ("stages.0.gptq.embedding_group_size", "16", BLOCKS)),
        ({"sym": False, "embedding_bits": 8}, ("stages.0.gptq.embedding_bits", "8", TABLES)),
        ({"target_bits": 4.5, "sym": False, "choices": [2, 3, 4]},
         ("stages.0.gptq.embedding_bits", "nothing (null)", TABLES)),
        ({"bits": 8, "sym": False}, ("stages.0.gptq.sym", "false", SYMMETRIC)),
        ({"target_bits": 4.5, "sym": False}, ("stages.0.gptq.sym", "false", SYMMETRIC)),
    ],
)  # fmt: skip
def test_group_sizes_and_bits_unsupported_by_gguf_are_refused(
    gptq: dict[str, Any], expected: tuple[str, str, str], tmp_path: Path
) -> None:
    assert problems(tmp_path, [{"gptq": gptq}, "gguf"], ["llama-cpp"]) == [expected]
    # A target brings the format in as well.
    assert problems(tmp_path, [{"gptq": gptq}], ["cpu", "llama-cpp"]) == [expected]
    assert problems(tmp_path, [{"gptq": gptq}], ["cpu"]) == []


@pytest.mark.parametrize(
    "gptq",
    [
        {"group_size": -1},
        {"group_size": 128, "bits": 3},
        {"bits": 8},
        {"sym": False, "embedding_bits": 16, "embedding_group_size": 16},
        {"target_bits": 4.5, "sym": False, "choices": [2, 3, 4], "embedding_bits": 5},
    ],
)
def test_settings_supported_by_gguf_are_accepted(gptq: dict[str, Any], tmp_path: Path) -> None:
    assert problems(tmp_path, [{"gptq": gptq}, "gguf"], ["llama-cpp"]) == []


@pytest.mark.parametrize(
    ("nncf", "expected"),
    [
        ({"group_size": 16}, ("group_size", "16", BLOCKS)),
        ({"mode": "int4_asym", "group_size": -1}, None),
    ],
)
def test_nncf_settings_supported_by_gguf(
    nncf: dict[str, Any], expected: tuple[str, str, str] | None, tmp_path: Path
) -> None:
    refusals = problems(tmp_path, [{"nncf_weights": nncf}, "gguf"], ["llama-cpp"])
    assert refusals == ([] if expected is None else [(f"stages.0.nncf_weights.{expected[0]}", *expected[1:])])


@pytest.mark.parametrize("stage", [{"lora_recovery": {"steps": 5}}, {"attach_lora": {"adapter": "mine"}}])
def test_gguf_refuses_an_adapter(stage: dict[str, Any], tmp_path: Path) -> None:
    (kind,) = stage
    expected = (f"stages.1.{kind}", f"{kind}, before gguf", "merge_lora before quantization, or a recipe without GGUF")
    stages = [{"gptq": {"group_size": 32}}, stage]
    assert problems(tmp_path, [*stages, "gguf"], ["llama-cpp"]) == [expected]
    assert problems(tmp_path, [*stages, "onnx"], ["cpu", "llama-cpp"]) == [expected]
    assert problems(tmp_path, [*stages, "onnx"], ["cpu"]) == []


@pytest.mark.parametrize("kind", ["merge_lora", "attach_lora"])
def test_adapter_on_equalized_layers_is_refused(kind: str, tmp_path: Path) -> None:
    stages = {"equalize": {}, "gptq": {"group_size": 32}, kind: {"adapter": "mine"}}
    after = [
        {name: stages[name]} for name in (["equalize", "gptq", kind] if kind == "attach_lora" else ["equalize", kind])
    ]
    words = "a recipe without equalize, or merge_lora before it"
    assert problems(tmp_path, [*after, "onnx"], ["cpu"]) == [("stages.0.equalize", f"equalize, before {kind}", words)]
    stages_before = [{"merge_lora": {"adapter": "mine"}}, "equalize", "gptq", "onnx"]
    assert problems(tmp_path, stages_before, ["cpu"]) == []


def test_only_the_last_quantization_is_checked(tmp_path: Path) -> None:
    stages = [{"gptq": {"group_size": 16}}, {"gptq": {"group_size": 32}}, "gguf"]
    assert problems(tmp_path, stages, ["llama-cpp"]) == []


GOOD = """\
name: good
task: text-generation
model: org/model
data:
  splits: {train: train.jsonl, test: test.jsonl}
stages:
  - onnx
evaluation: {windows: 20, stride: 64}
benchmark: {contexts: [128, 512], tokens: 16}
"""
CLASSES = GOOD.replace("text-generation", "text-classification")


def problems_of_text(folder: Path, text: str) -> list[Problem]:
    path = folder / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        read_recipe(path)
    return list(caught.value.problems)


def test_dumped_recipe_of_another_task_with_all_defaults_is_valid(tmp_path: Path) -> None:
    lines = [line for line in CLASSES.splitlines() if not line.startswith(("evaluation", "benchmark"))]
    path = tmp_path / "recipe.yaml"
    path.write_text("\n".join(lines))
    recipe = read_recipe(path)
    path.write_text(dump_recipe(recipe))
    assert "evaluation:" in path.read_text()
    assert read_recipe(path) == recipe


def test_generation_fields_are_refused_for_classification(tmp_path: Path) -> None:
    refused = problems_of_text(tmp_path, CLASSES)
    assert [problem.field for problem in refused] == [
        "evaluation.windows", "evaluation.stride", "benchmark.contexts", "benchmark.tokens",
    ]  # fmt: skip
    assert {problem.line for problem in refused} == {8, 9}
    assert "it does not apply to text-classification" in refused[0].expected


def test_row_fields_are_refused_for_running_text(tmp_path: Path) -> None:
    text = GOOD.replace("data:\n", "data:\n  labels: [good, bad]\n").replace("tokens: 16", "rate: 5, batch_size: 8")
    refused = problems_of_text(tmp_path, f"{text}slices: [{{length: quartiles}}]\n")
    assert {problem.field for problem in refused} == {"data.labels", "slices", "benchmark.rate", "benchmark.batch_size"}


OF_TEXT = ("token-classification", "text-ranking", "fill-mask", "question-answering")
OF_IMAGES = ("image-feature-extraction", "zero-shot-image-classification", "object-detection", "image-segmentation")
CLASSES_AND_TEXT = ("text-classification", "image-classification", *OF_TEXT, "audio-classification")


def test_stages_of_another_task_are_refused(tmp_path: Path) -> None:
    (problem,) = problems_of_text(tmp_path, GOOD.replace("  - onnx", "  - finetune\n  - onnx"))
    assert "for text-generation" in problem.found
    tasks = [*CLASSES_AND_TEXT, "text2text-generation", *OF_IMAGES, "image-text-to-text"]
    assert problem.expected == f"a recipe for {' and '.join(tasks)}"


def test_language_models_have_their_own_pruning_stages(tmp_path: Path) -> None:
    (problem,) = problems_of_text(tmp_path, GOOD.replace("  - onnx", "  - prune: {layers: 1}\n  - onnx"))
    assert problem.found == "prune, for text-generation" and problem.expected.startswith("prune_decoder, or a recipe")


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        (GOOD, "opset: 20", "20"),
        (GOOD, "fusions: false", "false"),
        (CLASSES, "last_token_only: true", "true"),
        (CLASSES, "accuracy_level: 1", "1"),
    ],
)
def test_fields_of_the_other_export_are_refused(tmp_path: Path, text: str, field: str, value: str) -> None:
    task = "text-generation" if text is GOOD else "text-classification"
    wrong = [problem for problem in problems_of_text(tmp_path, text.replace("- onnx", f"- onnx: {{{field}}}"))
             if problem.field.startswith("stages")]  # fmt: skip
    (problem,) = wrong
    assert problem.field == f"stages.0.onnx.{field.partition(':')[0]}"
    assert (problem.found, problem.line) == (value, 7)
    assert problem.expected == f"nothing: it does not apply to {task}"
