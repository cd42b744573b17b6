"""What a format cannot hold is named in the recipe, before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_generation import write_recipe

from compress.recipe.loading import read_recipe
from compress.utils.errors import RecipeError


def problems(folder: Path, stages: list[Any], targets: list[str]) -> list[tuple[str, str, str]]:
    """(field, found, expected) of a recipe over files that need not be there to be checked."""
    path = write_recipe(folder, stages=stages, targets=targets)
    try:
        read_recipe(path)
    except RecipeError as error:
        return [(problem.field, problem.found, problem.expected) for problem in error.problems]
    return []


BLOCKS = "a multiple of 32, GGUF's blocks"
TABLES = "4, 5 or 16: GGUF has no type for 8 bits with zero points"


@pytest.mark.parametrize(
    ("gptq", "expected"),
    [
        ({"group_size": 16}, ("stages.0.gptq.group_size", "16", BLOCKS)),
        (
            {"embedding_bits": 4, "embedding_group_size": 16},
            ("stages.0.gptq.embedding_group_size", "16", BLOCKS),
        ),
        (
            {"embedding_bits": 5, "embedding_group_size": 16},
            ("stages.0.gptq.embedding_group_size", "16", BLOCKS),
        ),
        ({"sym": False, "embedding_bits": 8}, ("stages.0.gptq.embedding_bits", "8", TABLES)),
        (
            {"target_bits": 4.5, "sym": False, "choices": [2, 3, 4]},
            ("stages.0.gptq.embedding_bits", "nothing (null)", TABLES),
        ),
        (
            {"bits": 8, "sym": False},
            ("stages.0.gptq.sym", "false", "true: GGUF has no type for 8 bits with zero points"),
        ),
        (
            {"target_bits": 4.5, "sym": False},
            ("stages.0.gptq.sym", "false", "true: GGUF has no type for 8 bits with zero points"),
        ),
    ],
)
def test_groups_and_bits_that_gguf_has_no_type_for(
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
def test_what_gguf_holds_is_let_through(gptq: dict[str, Any], tmp_path: Path) -> None:
    assert problems(tmp_path, [{"gptq": gptq}, "gguf"], ["llama-cpp"]) == []


@pytest.mark.parametrize(
    ("nncf", "expected"),
    [
        ({"group_size": 16}, ("group_size", "16", BLOCKS)),
        (
            {"backup_mode": "int8_asym"},
            ("backup_mode", "'int8_asym'", "int8_sym or none: GGUF has no type for 8 bits with zero points"),
        ),
        ({"backup_mode": "int8_asym", "all_layers": True}, None),
        ({"mode": "int4_asym", "group_size": -1}, None),
    ],
)
def test_what_of_nncf_gguf_holds(nncf: dict[str, Any], expected: tuple[str, str, str] | None, tmp_path: Path) -> None:
    refusals = problems(tmp_path, [{"nncf_weights": nncf}, "gguf"], ["llama-cpp"])
    assert refusals == ([] if expected is None else [(f"stages.0.nncf_weights.{expected[0]}", *expected[1:])])


@pytest.mark.parametrize("stage", [{"lora_recovery": {"steps": 5}}, {"attach_lora": {"adapter": "mine"}}])
def test_gguf_has_no_place_for_an_adapter(stage: dict[str, Any], tmp_path: Path) -> None:
    (kind,) = stage
    expected = (f"stages.1.{kind}", f"{kind}, before gguf", "merge_lora before quantization, or a recipe without GGUF")
    stages = [{"gptq": {"group_size": 32}}, stage]
    assert problems(tmp_path, [*stages, "gguf"], ["llama-cpp"]) == [expected]
    assert problems(tmp_path, [*stages, "onnx"], ["cpu", "llama-cpp"]) == [expected]
    assert problems(tmp_path, [*stages, "onnx"], ["cpu"]) == []


@pytest.mark.parametrize("kind", ["merge_lora", "attach_lora"])
def test_an_adapter_does_not_fit_layers_that_were_equalized(kind: str, tmp_path: Path) -> None:
    stages = {"equalize": {}, "gptq": {"group_size": 32}, kind: {"adapter": "mine"}}
    after = [
        {name: stages[name]} for name in (["equalize", "gptq", kind] if kind == "attach_lora" else ["equalize", kind])
    ]
    expected = "a recipe without equalize, or merge_lora before it"
    assert problems(tmp_path, [*after, "onnx"], ["cpu"]) == [
        ("stages.0.equalize", f"equalize, before {kind}", expected)
    ]
    stages_before = [{"merge_lora": {"adapter": "mine"}}, "equalize", "gptq", "onnx"]
    assert problems(tmp_path, stages_before, ["cpu"]) == []


def test_only_the_last_quantization_counts(tmp_path: Path) -> None:
    stages = [{"gptq": {"group_size": 16}}, {"gptq": {"group_size": 32}}, "gguf"]
    assert problems(tmp_path, stages, ["llama-cpp"]) == []
