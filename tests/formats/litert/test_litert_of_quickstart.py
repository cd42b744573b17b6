"""The quickstart's own student in LiteRT, beside the ONNX file that ships: all test rows, and bytes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from tiny_run import Notes

from compress.pipeline.run import run
from compress.recipe.loading import read_recipe

RECIPE = Path(__file__).parents[3] / "recipes" / "quickstart.yaml"
ARTIFACTS = Path(os.environ.get("COMPRESS_QUICKSTART", "artifacts"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (ARTIFACTS / "runs" / "quickstart").is_dir(),
        reason="the quickstart has not run: make demo, or name its artifacts in COMPRESS_QUICKSTART",
    ),
]


def test_it_answers_as_well_as_the_onnx_file_and_is_no_larger_than_a_tenth_more(tmp_path: Path) -> None:
    shutil.copytree(ARTIFACTS / "cache", tmp_path / "cache")  # the stages; neither stays in the user's own
    recipe = read_recipe(RECIPE, ["targets=[cpu, litert]", "benchmark.seconds=0.5"])
    report = run(recipe, RECIPE.parent, tmp_path, Notes()).report
    matches = {
        (metric, target): report.find("final", metric, target)
        for metric in ("accuracy", "size_bytes")
        for target in ("cpu", "litert")
    }
    value = {key: match.value for key, match in matches.items() if match is not None}
    accuracy = report.find("final", "accuracy", "litert")
    assert accuracy is not None and accuracy.n == 2000
    assert abs(value["accuracy", "litert"] - value["accuracy", "cpu"]) <= 0.005
    assert value["size_bytes", "litert"] <= 1.1 * value["size_bytes", "cpu"]
    speed = report.find("final", "speedup", "litert")
    assert speed is not None and speed.value > 1
