"""Tests of the targets of a recipe: names, fields and files, and the line of each mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from compress.formats.registry import FORMATS
from compress.recipe.loading import dump_recipe, read_recipe
from compress.recipe.recipe import Recipe
from compress.recipe.target_entries import TARGET_FIELDS
from compress.stages.registry import STAGES
from compress.utils.errors import RecipeError

RECIPE = """\
name: small
task: text-classification
model: somewhere
data:
  splits: {train: train.csv, test: test.csv}
stages:
- onnx
targets:
- cpu
"""
PI = "name: pi\ndescription: a small board\nformat: onnx\nthreads: 4\nmax_memory_bytes: 500000000\ndevice: pi\n"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(RECIPE)
    return path


def read(recipe: Path, targets: str) -> Recipe:
    return read_recipe(recipe, [f"targets={targets}"])


def problems(recipe: Path, targets: str) -> list[tuple[str, str, str, str | None]]:
    """Return (field, found, expected, nearest) of each problem."""
    with pytest.raises(RecipeError) as caught:
        read(recipe, targets)
    return [(problem.field, problem.found, problem.expected, problem.nearest) for problem in caught.value.problems]


def test_default_target_is_this_processor(recipe: Path) -> None:
    recipe.write_text(RECIPE.partition("targets:")[0])
    parsed = read_recipe(recipe)
    assert parsed.targets == ("cpu",) and "targets:\n- cpu" in dump_recipe(parsed)


def test_names_fields_and_files_become_target_rows(recipe: Path) -> None:
    (recipe.parent / "boards").mkdir()
    (recipe.parent / "boards" / "pi.yaml").write_text(PI)
    android = "{android: {format: ort, threads: 4, max_bytes: 12000000}}"
    parsed = read(recipe, f"[cpu, {android}, {{openvino: {{precision: fp16}}}}, boards/pi.yaml]")
    cpu, phone, openvino, pi = parsed.profiles()
    assert (cpu.name, cpu.threads, dict(cpu.options)) == ("cpu", None, {})
    assert (phone.target.format, phone.threads, phone.max_bytes) == ("ort", 4, 12000000)
    assert phone.instead_of == "an Android phone"
    assert (openvino.target.runtime, dict(openvino.options)) == ("openvino", {"precision": "fp16"})
    assert (pi.target.runtime, pi.target.provider, pi.target.format) == ("onnxruntime", "CPUExecutionProvider", "onnx")
    assert (pi.threads, pi.max_memory_bytes, pi.device) == (4, 500_000_000, "pi")
    assert pi.target.description == "a small board"


def test_dumped_recipe_contains_complete_targets(recipe: Path) -> None:
    (recipe.parent / "pi.yaml").write_text(PI)
    parsed = read(recipe, "[pi.yaml, {openvino: {tolerance: 0.01}}, desktop]")
    (recipe.parent / "pi.yaml").unlink()
    kept_file = recipe.parent / "kept.yaml"
    kept_file.write_text(dump_recipe(parsed))
    assert read_recipe(kept_file) == parsed


def test_mistakes_have_lines_and_the_nearest_name(recipe: Path) -> None:
    lines = "- andriod\n- openvino:\n    precison: fp16\n    tolerance: -1\n- {android: {treads: 4}}\n"
    recipe.write_text(RECIPE.replace("- cpu\n", lines))
    first = RECIPE.splitlines().index("targets:") + 1
    with pytest.raises(RecipeError) as caught:
        read_recipe(recipe)
    mistakes = [(problem.line, problem.field, problem.nearest) for problem in caught.value.problems]
    assert mistakes == [
        (first + 1, "targets.0", "android"),
        (first + 3, "targets.1.openvino.precison", "precision"),
        (first + 4, "targets.1.openvino.tolerance", None),
        (first + 5, "targets.2.android.treads", "threads"),
    ]


@pytest.mark.parametrize(
    ("targets", "field", "found", "expected"),
    [
        ("[cpu, cpu]", "targets.1", "a second 'cpu'", "each target once"),
        ("3", "targets", "3", "a list of targets, e.g. `[cpu, browser]`"),
        ("[[cpu]]", "targets.0", "a list of 1", "a target's name, `{NAME: {FIELD: VALUE}}` or a file (.yaml)"),
        ("[{cpu: 3}]", "targets.0.cpu", "3", "the fields of cpu as a mapping"),
        ("[{gpu: {format: gguf}}]", "targets.0.gpu.format", "'gguf'", "one of onnx, which gpu runs"),
        ("[{android: {threads: 0}}]", "targets.0.android.threads", "0", "a number of at least 1"),
        ("[{cpu: {opset: 18}}]", "targets.0.cpu.opset", "a field of onnx, a stage of this recipe",
         "it at stages.0.onnx"),
        ("[{pi: {format: gguf, runtime: onnxruntime}}]", "targets.0.pi.runtime", "'onnxruntime'",
         "one of llama-cpp, which open gguf"),
        ("[{cpu: {device: pi}}]", "targets.0.cpu.device", "'pi'",
         "nothing: cpu has its own; a target of your own needs another name"),
        ("[{pi: {format: openvino, runtime: openvino, device: pi}}]", "targets.0.pi.device", "'pi'",
         "nothing: devices are measured with onnxruntime, on ONNX files"),
    ],
)  # fmt: skip
def test_invalid_targets_are_refused(recipe: Path, targets: str, field: str, found: str, expected: str) -> None:
    assert problems(recipe, targets) == [(field, found, expected, None)]


def test_misspelt_target_with_fields_is_not_a_custom_target(recipe: Path) -> None:
    ((field, _, expected, nearest),) = problems(recipe, "[{andriod: {format: ort}}]")
    assert (field, nearest) == ("targets.0.andriod", "android") and "a target of your own" in expected


def test_mistakes_in_a_target_file_have_its_lines(recipe: Path) -> None:
    (recipe.parent / "pi.yaml").write_text("name: pi\nformat: onnx\nthreadz: 4\nmax_bytes: -1\n")
    with pytest.raises(RecipeError) as caught:
        read(recipe, "[pi.yaml, gone.yaml]")
    mistakes = {
        (problem.file.rsplit("/", 1)[-1], problem.line, problem.field, problem.nearest)
        for problem in caught.value.problems
    }
    assert mistakes == {
        ("pi.yaml", 3, "threadz", "threads"),
        ("pi.yaml", 4, "max_bytes", None),
        ("gone.yaml", None, "target", "pi.yaml"),
    }


@pytest.mark.parametrize(
    ("text", "field"), [("format: onnx\n", "name"), ("name: cpu\nformat: onnx\n", "name"), ("name: pi\n", "format")]
)
def test_target_file_requires_a_new_name_and_a_format(recipe: Path, text: str, field: str) -> None:
    (recipe.parent / "pi.yaml").write_text(text)
    assert [problem[0] for problem in problems(recipe, "[pi.yaml]")] == [field]


def test_stage_options_and_target_fields_are_disjoint() -> None:
    for kind in filter(None, (spec.written_by for spec in FORMATS.values())):
        assert not set(STAGES[kind].model_fields) & set(TARGET_FIELDS), kind


def test_python_api_raises_the_same_errors(recipe: Path) -> None:
    values: dict[str, Any] = {**read_recipe(recipe).model_dump(), "targets": [{"openvino": {"precision": "fp17"}}]}
    with pytest.raises(ValueError, match="precision: Input should be 'fp32', 'fp16' or 'int8'"):
        Recipe(**values)
