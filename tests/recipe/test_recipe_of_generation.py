"""Recipes of text generation: what they may say, and what means nothing in them."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from compress.recipe.loading import dump_recipe, read_recipe
from compress.recipe.starter import starter
from compress.utils.errors import Problem, RecipeError

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


def problems(folder: Path, text: str) -> list[Problem]:
    path = folder / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        read_recipe(path)
    return list(caught.value.problems)


def test_reads_and_writes(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(GOOD)
    recipe = read_recipe(path)
    assert (recipe.evaluation.windows, recipe.evaluation.stride) == (20, 64)
    assert recipe.benchmark.contexts == (128, 512)
    path.write_text(dump_recipe(recipe))
    assert read_recipe(path) == recipe


def test_a_dumped_recipe_of_the_other_task_reads_although_it_has_all_defaults(tmp_path: Path) -> None:
    lines = [line for line in CLASSES.splitlines() if not line.startswith(("evaluation", "benchmark"))]
    path = tmp_path / "recipe.yaml"
    path.write_text("\n".join(lines))
    recipe = read_recipe(path)
    path.write_text(dump_recipe(recipe))
    assert "evaluation:" in path.read_text()
    assert read_recipe(path) == recipe


def test_fields_of_generation_mean_nothing_for_classes(tmp_path: Path) -> None:
    found = problems(tmp_path, CLASSES)
    assert [problem.field for problem in found] == [
        "evaluation.windows", "evaluation.stride", "benchmark.contexts", "benchmark.tokens",
    ]  # fmt: skip
    assert {problem.line for problem in found} == {8, 9}
    assert "it means nothing for text-classification" in found[0].expected


def test_fields_of_rows_mean_nothing_for_running_text(tmp_path: Path) -> None:
    text = GOOD.replace("data:\n", "data:\n  labels: [good, bad]\n").replace("tokens: 16", "rate: 5, batch_size: 8")
    found = problems(tmp_path, f"{text}slices: [{{length: quartiles}}]\n")
    assert {problem.field for problem in found} == {"data.labels", "slices", "benchmark.rate", "benchmark.batch_size"}


OF_TEXT = ("token-classification", "text-ranking", "fill-mask", "question-answering")
OF_IMAGES = ("image-feature-extraction", "zero-shot-image-classification", "object-detection", "image-segmentation")
CLASSES_AND_TEXT = ("text-classification", "image-classification", *OF_TEXT, "audio-classification")


@pytest.mark.parametrize(
    ("stage", "tasks"),
    [
        ("finetune", [*CLASSES_AND_TEXT, "text2text-generation", *OF_IMAGES, "image-text-to-text"]),
    ],
)
def test_stages_of_another_task_are_refused(tmp_path: Path, stage: str, tasks: list[str]) -> None:
    (problem,) = problems(tmp_path, GOOD.replace("  - onnx", f"  - {stage}\n  - onnx"))
    assert "for text-generation" in problem.found
    assert problem.expected == f"a recipe for {' and '.join(tasks)}"


def test_language_models_have_stages_of_their_own_for_pruning(tmp_path: Path) -> None:
    (problem,) = problems(tmp_path, GOOD.replace("  - onnx", "  - prune: {layers: 1}\n  - onnx"))
    assert problem.found == "prune, for text-generation" and problem.expected.startswith("prune_decoder, or a recipe")


@pytest.mark.parametrize(
    ("text", "field", "found"),
    [
        (GOOD, "opset: 20", "20"),
        (GOOD, "fusions: false", "false"),
        (CLASSES, "last_token_only: true", "true"),
        (CLASSES, "accuracy_level: 1", "1"),
    ],
)
def test_fields_of_the_other_export_mean_nothing(tmp_path: Path, text: str, field: str, found: str) -> None:
    task = "text-generation" if text is GOOD else "text-classification"
    wrong = [problem for problem in problems(tmp_path, text.replace("- onnx", f"- onnx: {{{field}}}"))
             if problem.field.startswith("stages")]  # fmt: skip
    (problem,) = wrong
    assert problem.field == f"stages.0.onnx.{field.partition(':')[0]}"
    assert (problem.found, problem.line) == (found, 7)
    assert problem.expected == f"nothing: it means nothing for {task}"


@pytest.mark.parametrize(
    ("old", "new", "field"),
    [
        ("windows: 20", "windows: 0", "evaluation.windows"),
        ("stride: 64", "strid: 64", "evaluation.strid"),
        ("[128, 512]", "[]", "benchmark.contexts"),
        ("[128, 512]", "[0]", "benchmark.contexts.0"),
    ],
)
def test_values_out_of_bounds_are_named(tmp_path: Path, old: str, new: str, field: str) -> None:
    assert problems(tmp_path, GOOD.replace(old, new))[0].field == field


def test_starter_reads(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(starter("text-generation"))
    recipe = read_recipe(path)
    assert recipe.labels() == ("equalize", "gptq", "onnx")
    assert recipe.evaluation.windows == 20
    assert set(yaml.safe_load(path.read_text())["data"]["splits"]) == {"train", "test"}
