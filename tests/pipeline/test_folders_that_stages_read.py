"""Folders that a recipe names beside models and data: found, kept in the key, named absolutely in the run's copy."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny

from compress.formats.onnx.stage import Onnx
from compress.pipeline.keys import Keys
from compress.pipeline.run import with_absolute_paths
from compress.pipeline.runner import StageRunner
from compress.recipe.recipe import Recipe
from compress.stages.merge_lora import MergeLora
from compress.utils.errors import InputError
from compress.utils.progress import SilentProgress

RECIPE = Recipe.model_validate(
    {
        "name": "r",
        "task": tiny.TASK,
        "model": "model",
        "data": {"splits": {"train": "train.csv", "test": "test.csv"}},
        "stages": [{"merge_lora": {"adapter": "mine"}}, {"onnx": {}}],
    }
)


def test_the_bytes_of_the_folder_are_in_the_key() -> None:
    digests = iter(["one", "one", "other"])
    keys = Keys(RECIPE, tiny.dataset(), lambda reference: "model", lambda reference: next(digests))
    found = [keys.stage(MergeLora(adapter="mine"), "input", []) for _ in range(3)]
    assert found[0] == found[1] != found[2]


def test_a_stage_that_reads_none_keeps_its_key() -> None:
    def refuse(reference: str) -> str:
        raise AssertionError(reference)

    keys = Keys(RECIPE, tiny.dataset(), lambda reference: "model", refuse)
    assert keys.stage(Onnx(), "input", []) == keys.stage(Onnx(), "input", [])


def test_it_is_found_beside_the_recipe(tmp_path: Path) -> None:
    runner = StageRunner(RECIPE, tmp_path, tmp_path / "artifacts", SilentProgress())
    with pytest.raises(InputError, match="There is no folder 'mine'"):
        runner.inputs.locate("mine")
    (tmp_path / "mine").mkdir()
    assert runner.inputs.locate("mine") == tmp_path / "mine"
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="There is no folder 'file'"):
        runner.inputs.locate("file")


def test_the_runs_own_recipe_names_it_absolutely(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (stage, _) = with_absolute_paths(RECIPE, tmp_path).stages
    assert isinstance(stage, MergeLora) and stage.adapter == str((tmp_path / "mine").resolve())
