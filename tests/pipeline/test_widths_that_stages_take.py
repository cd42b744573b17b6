"""What stages ask of the starting model's widths, before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_run
from tiny_generation import write_all

from compress.stages.model_checks import check_stages
from compress.utils.errors import ModelError

ROUNDS = {"gptq": {"group_size": 128}}
"""The tiny model's states are 64 wide."""


def ask(folder: Path, *stages: dict[str, Any]) -> None:
    recipe = tiny_run.load(write_all(folder, stages=[*stages, {"onnx": {}}]))
    check_stages(recipe.stages, folder / "model")


@pytest.mark.parametrize("stage", [ROUNDS, {"block_qat": {"group_size": 128}}, {"nncf_weights": {"group_size": 128}}])
def test_groups_that_divide_no_width_are_refused(tmp_path: Path, stage: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="do not fit the GPTQ format with group_size 128"):
        ask(tmp_path, stage)


@pytest.mark.parametrize("stage", ["gptq", "block_qat", "nncf_weights"])
def test_groups_are_to_divide_the_widths_that_a_cut_leaves(tmp_path: Path, stage: str) -> None:
    """Of 128 neurons 96 are left, which groups of 64 don't divide and groups of 32 do."""
    cut = {"prune_decoder": {"feed_forward": 0.25, "multiple": 32}}
    ask(tmp_path, {stage: {"group_size": 64}})
    with pytest.raises(ModelError, match=r"down_proj \[64, 96\]: 64 does not divide 96"):
        ask(tmp_path, cut, {stage: {"group_size": 64}})
    ask(tmp_path, cut, {stage: {"group_size": 32}})


def test_of_widths_that_none_can_tell_nothing_is_asked(tmp_path: Path) -> None:
    student = {"distill_language_model": {"student": {"config": {"intermediate_size": 128}}}}
    ask(tmp_path, student, ROUNDS)
    with pytest.raises(ModelError, match="do not fit"):
        ask(tmp_path, {"prune_decoder": {"layers": 1}}, ROUNDS)


def test_a_recipe_is_checked_for_it_before_it_runs(tmp_path: Path) -> None:
    path = write_all(tmp_path, stages=[ROUNDS, {"onnx": {}}])
    done = tiny_run.compress("check", path, folder=tmp_path)
    assert done.returncode == 2
    assert "do not fit the GPTQ format with group_size 128" in done.stderr
    assert "choose a group_size that divides all widths" in done.stderr
