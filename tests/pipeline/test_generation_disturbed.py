"""Stages for language models whose run is killed: nothing half-written counts, and all goes on."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import pytest
import tiny_generation
import tiny_run
from mergeable import save_mergeable_llama

from compress.pipeline.cache import Cache
from compress.pipeline.runner import StageRunner
from compress.recipe.recipe import Recipe

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")]
RECOVERY: dict[str, Any] = {
    "steps": 12,
    "sequence_length": 32,
    "batch_size": 2,
    "validation_windows": 4,
    "precision": "fp32",
}
GPTQ: dict[str, Any] = {"bits": 2, "group_size": 32, "samples": 4, "sequence_length": 16, "embedding_bits": 4}
STAGES: dict[str, list[Any]] = {
    "onnx": [
        {"gptq": GPTQ},
        {"tune_scales": {**RECOVERY, "learning_rate": 0.002}},
        {"lora_recovery": {**RECOVERY, "learning_rate": 0.002, "rank": 4}},
        {"onnx": {"rounding_limit": 1.0}},
    ],
    "gguf": [{"gptq": {**GPTQ, "bits": 4, "method": "rtn"}}, "gguf"],
}
PLACES = [("onnx", 0), ("onnx", 2), ("gguf", 1)]
"""Stages by recipe and index: `gptq` stores blocks to resume from, `lora_recovery` trains, `gguf` writes one file."""
PATIENCE_SECONDS = 300.0


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model, texts, a recipe for each format, and the artifacts of undisturbed roads."""
    folder = tmp_path_factory.mktemp("place")
    save_mergeable_llama(folder / "model")
    tiny_generation.write_texts(folder, words=240)
    for name, stages in STAGES.items():
        target = "llama-cpp" if name == "gguf" else "cpu"
        tiny_generation.write_recipe(folder, name, stages=stages, targets=[target])
    return folder


@pytest.fixture(scope="module")
def undisturbed(place: Path) -> dict[str, list[str]]:
    """The digest of each stage's files, by recipe."""
    return {name: digests(recipe(place, name), place, place / "undisturbed") for name in STAGES}


def recipe(place: Path, name: str) -> Recipe:
    return tiny_run.load(place / f"{name}.yaml")


def digests(wanted: Recipe, place: Path, artifacts: Path) -> list[str]:
    runner = StageRunner(wanted, place, artifacts, tiny_run.Notes())
    runner.run_all()
    return [runner.digest_of(label) for label in wanted.labels()]


@pytest.mark.parametrize(("name", "index"), PLACES)
def test_a_run_that_is_killed_in_a_stage_goes_on_and_ends_alike(
    place: Path, undisturbed: dict[str, list[str]], tmp_path: Path, name: str, index: int
) -> None:
    stage_recipe = recipe(place, name)
    label = stage_recipe.labels()[index]
    process = tiny_run.start("run", place / f"{name}.yaml", "--artifacts", tmp_path)
    end = time.monotonic() + PATIENCE_SECONDS
    while not any(f"] {label}\n" in log.read_text() for log in tmp_path.glob("runs/*/*/run.log")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "the stage never began"
        time.sleep(0.005)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert len(Cache(tmp_path / "cache").entries()) == index
    assert not list(tmp_path.glob("runs/*/latest"))
    assert digests(stage_recipe, place, tmp_path) == undisturbed[name]
    assert Cache(tmp_path / "cache").remove_partial() == 0
