"""Tests of a stage's input folders in cache keys, of quantization group sizes, and of a run by two processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_run
from tiny_generation import write_all

from compress.formats.onnx.stage import Onnx
from compress.pipeline.keys import Keys
from compress.pipeline.runner import StageRunner
from compress.recipe.recipe import Recipe
from compress.stages.lora import MergeLora
from compress.stages.protocols import check_stages
from compress.utils.errors import InputError, ModelError
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


def test_stage_key_depends_on_digest_of_adapter_folder() -> None:
    digests = iter(["one", "one", "other"])
    keys = Keys(RECIPE, tiny.dataset(), lambda reference: "model", lambda reference: next(digests))
    keys_of_stage = [keys.stage(MergeLora(adapter="mine"), "input", []) for _ in range(3)]
    assert keys_of_stage[0] == keys_of_stage[1] != keys_of_stage[2]


def test_key_of_stage_without_input_folder_resolves_no_folder() -> None:
    def refuse(reference: str) -> str:
        raise AssertionError(reference)

    keys = Keys(RECIPE, tiny.dataset(), lambda reference: "model", refuse)
    assert keys.stage(Onnx(), "input", []) == keys.stage(Onnx(), "input", [])


def test_input_folder_is_resolved_relative_to_recipe(tmp_path: Path) -> None:
    runner = StageRunner(RECIPE, tmp_path, tmp_path / "artifacts", SilentProgress())
    with pytest.raises(InputError, match="There is no folder 'mine'"):
        runner.inputs.locate("mine")
    (tmp_path / "mine").mkdir()
    assert runner.inputs.locate("mine") == tmp_path / "mine"
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="There is no folder 'file'"):
        runner.inputs.locate("file")


ROUNDS = {"gptq": {"group_size": 128}}
"""The stage's group size, 128, does not divide the tiny model's hidden size, 64."""


def check_recipe_stages(folder: Path, *stages: dict[str, Any]) -> None:
    recipe = tiny_run.load(write_all(folder, stages=[*stages, {"onnx": {}}]))
    check_stages(recipe.stages, folder / "model")


@pytest.mark.parametrize("stage", ["gptq", "block_qat", "nncf_weights"])
def test_group_size_must_divide_widths_after_pruning(tmp_path: Path, stage: str) -> None:
    """Pruning keeps 96 of 128 neurons: a group size of 64 does not divide 96, but 32 does."""
    cut = {"prune_decoder": {"feed_forward": 0.25, "multiple": 32}}
    check_recipe_stages(tmp_path, {stage: {"group_size": 64}})
    with pytest.raises(ModelError, match=r"down_proj \[64, 96\]: 64 does not divide 96"):
        check_recipe_stages(tmp_path, cut, {stage: {"group_size": 64}})
    check_recipe_stages(tmp_path, cut, {stage: {"group_size": 32}})


def test_group_size_is_not_checked_when_widths_are_unknown(tmp_path: Path) -> None:
    student = {"distill_language_model": {"student": {"config": {"intermediate_size": 128}}}}
    check_recipe_stages(tmp_path, student, ROUNDS)
    with pytest.raises(ModelError, match="do not fit"):
        check_recipe_stages(tmp_path, {"prune_decoder": {"layers": 1}}, ROUNDS)


LAUNCHER = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone")


@pytest.mark.slow
def test_two_distributed_processes_write_one_run(tmp_path: Path) -> None:
    benchmark = {**tiny_run.BENCHMARK, "every_stage": False}
    recipe = tiny_run.write_all(tmp_path, stages=[*tiny_run.STAGES[:2], {"onnx": {}}], benchmark=benchmark)
    command = [*LAUNCHER, "-m", "compress", "run", str(recipe)]
    done = subprocess.run(
        command, cwd=tmp_path, env=tiny_run.surroundings(), capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    runs = [path for path in (tmp_path / "artifacts" / "runs" / "tiny").iterdir() if not path.is_symlink()]
    assert len(runs) == 1
    report = tiny_run.read_report(tmp_path / "artifacts")
    accuracies = {row["model"]: row["value"] for row in report["measurements"] if row["metric"] == "accuracy"}
    assert accuracies["baseline"] > 0.75
    # Each of the two processes trains on half of the batches: 15 steps of 4 rows each instead of 30.
    assert "finetune (15 steps)" in (runs[0] / "run.log").read_text()

    again = tiny_run.compress("run", recipe, folder=tmp_path)
    assert again.returncode == 0, again.stderr
    assert all(tiny_run.cached_stages(tiny_run.read_report(tmp_path / "artifacts")).values())
