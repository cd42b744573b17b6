"""Tests of `compress compare` with and without `--now` on two runs of a language model, with 4 and with 2 bits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_generation
import tiny_run
from command_line import invoke
from quantized import save_tiny_llama
from safetensors.torch import load_file, save_file
from typer.testing import Result

from compress.pipeline.run import run
from compress.results.report import Report

pytestmark = pytest.mark.slow
Runs = dict[str, Path]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Return the folders of both runs by their names, `four` and `two`."""
    folder = tmp_path_factory.mktemp("runs")
    save_tiny_llama(folder / "model")
    # A random model loses nothing at 2 bits; with its final norm scaled by 3, its perplexity is clearly higher.
    shutil.copytree(folder / "model", folder / "surer")
    tensors = load_file(folder / "surer" / "model.safetensors")
    tensors["model.norm.weight"] *= 3
    save_file(tensors, folder / "surer" / "model.safetensors", metadata={"format": "pt"})
    tiny_generation.write_texts(folder)
    questions = [{"prompt": "some", "choices": ["words", "meaning"], "answer": number % 2} for number in range(4)]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    run_folders = {}
    for name, bits in {"four": 4, "two": 2}.items():
        gptq = {"bits": bits, "group_size": 32, "samples": 4, "sequence_length": 16, "embedding_bits": 4}
        stages = [{"gptq": gptq}, {"onnx": {"rounding_limit": 1.0}}]
        path = tiny_generation.write_recipe(folder, name, stages=stages, model={4: "model", 2: "surer"}[bits])
        recipe = tiny_run.load(path, "evaluation.questions=questions.jsonl")
        run_folders[name] = run(recipe, folder, folder / "artifacts", tiny_run.Notes()).folder
    return run_folders


def report(folder: Path) -> Report:
    return Report.model_validate_json((folder / "report.json").read_text())


def changes(result: Result) -> dict[str, dict[str, Any]]:
    change_records: list[dict[str, Any]] = json.loads(result.stdout)["changes"]
    return {change["metric"]: change for change in change_records}


@pytest.fixture
def perplexity_increase(runs: Runs) -> Callable[[], float]:
    """Return a function that computes the relative perplexity increase from 4 to 2 bits."""

    def ratio() -> float:
        rows = [report(runs[name]).find("final", "perplexity", "cpu") for name in ("two", "four")]
        assert rows[0] is not None and rows[1] is not None
        return rows[0].value / rows[1].value - 1

    return ratio


def test_compare_now_measures_the_metrics_of_a_run(runs: Runs, perplexity_increase: Callable[[], float]) -> None:
    result = invoke("compare", runs["four"], runs["two"], "--now", "--budget", "4", "--json")
    compared = changes(result)
    assert json.loads(result.stdout)["how"] == "side by side"
    assert compared["perplexity"]["method"] == "paired bootstrap over 6 windows"
    assert compared["perplexity"]["effect"] == pytest.approx(perplexity_increase())
    reported = changes(invoke("compare", runs["four"], runs["two"], "--json"))
    for metric in ("repetition", "choice_accuracy"):
        assert (compared[metric]["baseline"], compared[metric]["candidate"]) == (
            reported[metric]["baseline"],
            reported[metric]["candidate"],
        )
    for metric in ("time_per_output_token_ms_context_16", "time_to_first_token_ms_context_16"):
        assert "launches of both" in compared[metric]["method"]
