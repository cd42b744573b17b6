"""Tests of warnings of a final model that is larger than the given one, or hardly smaller."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper
from onnx_graphs import onnx_model
from safetensors.numpy import save_file

from compress.formats.onnx.model import FLOAT_GRAPH, OnnxModel
from compress.pipeline.size_warnings import measured_warnings, predicted_warning
from compress.recipe.recipe import Recipe
from compress.stages.cost_model import Shape

ROWS, COLUMNS = 1000, 64


def recipe(*stages: str | dict[str, Any], task: str = "text-generation", **changes: Any) -> Recipe:
    data = {"splits": {"train": "train.jsonl", "test": "test.jsonl"}}
    return Recipe.model_validate({"name": "r", "task": task, "model": "m", "data": data, "stages": stages, **changes})


def save_final(folder: Path, table: np.ndarray, name: str = "model.embed_tokens.weight") -> Path:
    """Save a graph that looks rows of ``table`` up, and a second file of 1,000 bytes."""
    graph = onnx_model(
        [helper.make_node("Gather", [name, "ids"], ["rows"])], {"ids": ["n"]}, {"rows": ["n", COLUMNS]}, {name: table}
    )
    folder.mkdir()
    OnnxModel(graph, FLOAT_GRAPH, {"config.json": b" " * 1000}).save(folder)
    return folder


def save_given(folder: Path, size: int) -> Path:
    folder.mkdir()
    (folder / "given.gguf").write_bytes(bytes(size))
    return folder / "given.gguf"


@pytest.fixture
def final(tmp_path: Path) -> Path:
    return save_final(tmp_path / "final", np.zeros((ROWS, COLUMNS), np.float32))


def bytes_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def test_warning_starts_one_byte_above_the_given_size(final: Path, tmp_path: Path) -> None:
    plain = recipe({"gptq": {"embedding_bits": 16}}, "onnx")
    size = bytes_of(final)
    same, smaller = save_given(tmp_path / "same", size), save_given(tmp_path / "smaller", size - 1)
    assert measured_warnings(plain, same, final, {"cpu": final}) == []
    (warning,) = measured_warnings(plain, smaller, final, {"cpu": final})
    assert warning.startswith("The final model is larger than given.gguf: 257 kB instead of 257 kB. 256 kB of it are")
    built = recipe("onnx", random_weights=True)
    assert measured_warnings(built, smaller, final, {"cpu": final}) == []


@pytest.mark.parametrize(
    ("room", "bits", "bytes_of_table", "shown"),
    [(80_000, 8, 68_000, "68.0 kB"), (50_000, 4, 36_000, "36.0 kB")],
)
def test_warning_names_tensor_field_and_predicted_size(
    final: Path, tmp_path: Path, room: int, bits: int, bytes_of_table: int, shown: str
) -> None:
    given = save_given(tmp_path / "given", room)
    (warning,) = measured_warnings(recipe({"gptq": {"embedding_bits": 16}}, "onnx"), given, final, {})
    after = bytes_of(final) - 4 * ROWS * COLUMNS + bytes_of_table
    assert "256 kB of it are model.embed_tokens.weight [1000, 64] in float32. " in warning
    assert warning.endswith(
        f"With `gptq: {{embedding_bits: {bits}}}` these would be about {shown}, and the model {after / 1000:.1f} kB."
    )


@pytest.mark.parametrize(
    ("stages", "task", "words"),
    [
        (("onnx",), "text-generation", "With the stage `gptq` these would be about 36.0 kB"),
        (("onnx",), "text-classification", "With the stage `onnx_int8` these would be about 68.0 kB"),
        (("onnx", {"onnx_int8": {"embedding_bits": 32}}), "text-classification", "With `onnx_int8: {embedding_bits: "),
    ],
)
def test_remedy_depends_on_stages_and_task(
    stages: tuple[Any, ...], task: str, words: str, final: Path, tmp_path: Path
) -> None:
    (warning,) = measured_warnings(recipe(*stages, task=task), save_given(tmp_path / "given", 9), final, {})
    assert words in warning


def test_integers_and_matrices_get_no_field(tmp_path: Path) -> None:
    given = save_given(tmp_path / "given", 9)
    packed = save_final(tmp_path / "packed", np.zeros((ROWS, COLUMNS), np.uint8))
    matrix = save_final(tmp_path / "matrix", np.zeros((ROWS, COLUMNS), np.float32), "model.layers.0.mlp.weight")
    for folder in (packed, matrix):
        (warning,) = measured_warnings(recipe("gptq", "onnx"), given, folder, {})
        assert "With" not in warning


def test_each_larger_file_of_a_target_is_named(final: Path, tmp_path: Path) -> None:
    small = save_final(tmp_path / "small", np.zeros((2, COLUMNS), np.float32))
    given = save_given(tmp_path / "given", 100_000)
    warnings = measured_warnings(recipe("gptq"), given, small, {"cpu": final, "genai": final, "other": small})
    assert [warning.partition(" is ")[0] for warning in warnings] == ["The final model for genai"]


def test_external_data_of_a_given_graph_counts(final: Path, tmp_path: Path) -> None:
    given = tmp_path / "given" / "model.onnx"
    given.parent.mkdir()
    (file,) = final.rglob("*.onnx")
    graph = onnx.load(file)
    onnx.save(graph, given, save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert given.stat().st_size < 1000
    # The final folder has another file of 1,000 bytes.
    (warning,) = measured_warnings(recipe("onnx"), given, final, {})
    assert "larger than model.onnx: 257 kB instead of 256 kB." in warning


@pytest.mark.parametrize(
    ("stage", "extra_bytes", "warned"),
    [
        ("onnx_int8", 0, True),
        ("onnx_int8", 100_000, False),
        ({"onnx_int8": {"method": "static"}}, 0, False),
        ("onnx_weight_only", 0, False),
    ],
)
def test_graph_that_int8_leaves_in_float_is_hardly_smaller(
    final: Path, tmp_path: Path, stage: str | dict[str, Any], extra_bytes: int, warned: bool
) -> None:
    (file,) = final.rglob("*.onnx")
    graph = onnx.load(file)
    graph.doc_string = "x" * (2000 + extra_bytes)
    given = tmp_path / "model.onnx"
    onnx.save(graph, given)
    warnings = measured_warnings(recipe(stage, task="graph-agreement"), given, final, {})
    expected = [
        f"The final model is hardly smaller than model.onnx: 257 kB instead of 258 kB. Its largest tensor is "
        f"model.embed_tokens.weight [{ROWS}, {COLUMNS}] in float32. `onnx_int8: {{method: static}}` stores "
        "convolutions in integers too."
    ]
    assert warnings == (expected if warned else [])


def test_predicted_size_is_compared_with_the_file(tmp_path: Path) -> None:
    shape = Shape(ROWS * COLUMNS, 0, 10_000, 0, 1, matrix_bits=4, table_bits=32)
    given = tmp_path / "model.safetensors"
    save_file({"model.embed_tokens.weight": np.zeros((ROWS, COLUMNS), np.int8)}, given)
    after = 4 * ROWS * COLUMNS + 5_000
    warning = predicted_warning(recipe({"gptq": {"embedding_bits": 16}}, "onnx"), given, shape, after)
    assert warning == (
        "The final model will be larger than m: 261 kB instead of 64.1 kB. 256 kB of it are "
        "model.embed_tokens.weight [1000, 64] at 32 bits. With `gptq: {embedding_bits: 4}` these would be about "
        "36.0 kB, and the model 41.0 kB."
    )
    assert predicted_warning(recipe("gptq", "onnx"), given, shape, given.stat().st_size) is None
    assert predicted_warning(recipe("gptq", "onnx"), given, None, None) is None
    wide = Shape(100, 0, 10_000, 0, 1, matrix_bits=32, table_bits=32)
    matrices = predicted_warning(recipe("onnx"), given, wide, 1e6)
    assert matrices is not None and "40.0 kB of it are matrices at 32 bits. With the stage `gptq`" in matrices
