"""Tests of the torch target: as the reference of other targets, and as a stand-in where none of them can run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_generation
import tiny_run
import torch
import transformers
from command_line import invoke, output_of
from tiny_run import Notes, load, write_all

import compress.pipeline.measurements as subject
from compress.formats.runtime import get_runtime
from compress.formats.targets import TARGETS
from compress.pipeline import formats
from compress.pipeline.planning import make_plan
from compress.pipeline.run import Run, run
from compress.report.console import closing_line
from compress.results.metrics import describe_metric
from compress.utils.errors import InputError, ModelError, StageError
from compress.utils.storage import size_bytes

pytestmark = pytest.mark.slow

STAGES = [{"finetune": {"epochs": 1, "batch_size": 8, "learning_rate": 2e-3}}, "onnx", "onnx_int8"]
LABELS = ("baseline", "onnx", "onnx_int8", "final")


@pytest.fixture(scope="module")
def recipe_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a recipe for the targets cpu and torch."""
    folder = tmp_path_factory.mktemp("place")
    write_all(folder, stages=STAGES, targets=["cpu", "torch"])
    return folder


def go(recipe_folder: Path, *changes: str) -> Run:
    """Run the recipe with overrides; all runs share one cache, so that the model is trained and timed once."""
    return run(load(recipe_folder / "tiny.yaml", *changes), recipe_folder, recipe_folder / "artifacts", Notes())


@pytest.fixture(scope="module")
def both(recipe_folder: Path) -> Run:
    return go(recipe_folder)


def texts(recipe_folder: Path) -> list[str]:
    return [line.rpartition(",")[0] for line in (recipe_folder / "test.csv").read_text().splitlines()[1:]]


def classes(recipe_folder: Path, folder: Path) -> np.ndarray:
    """Return the class ids that transformers predicts with the weights in ``folder``, one text at a time."""
    module = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        rows = [tokenizer(text, truncation=True, max_length=16, return_tensors="pt") for text in texts(recipe_folder)]
        return np.array([int(module(**row).logits.argmax()) for row in rows])


def test_torch_weights_are_evaluated_and_timed(recipe_folder: Path, both: Run) -> None:
    (finetuned,) = set((recipe_folder / "artifacts" / "cache").rglob("model.safetensors"))
    answers = classes(recipe_folder, finetuned.parent)
    labels = [line.rpartition(",")[2] for line in (recipe_folder / "test.csv").read_text().splitlines()[1:]]
    right = np.mean([tiny_run.LABELS[label_id] == label for label_id, label in zip(answers, labels, strict=True)])
    for model in ("baseline", "final"):
        rows = [row for row in both.report.measurements if (row.model, row.target) == (model, "torch")]
        values = {row.metric: row.value for row in rows}
        assert values["accuracy"] == pytest.approx(right) and values["agreement"] == 1
        assert values["size_bytes"] == sum(path.stat().st_size for path in finetuned.parent.iterdir())
        assert values["latency_ms"] > 0 and values["peak_memory_bytes"] > 5e7
    note = "torch: final has the weights of finetune, from which the output of onnx_int8 was written"
    assert note in both.report.notes
    assert not (both.folder / "targets").exists(), "weights are in the cache"


def test_other_targets_are_compared_with_torch(recipe_folder: Path, both: Run) -> None:
    (finetuned,) = set((recipe_folder / "artifacts" / "cache").rglob("model.safetensors"))
    expected = classes(recipe_folder, finetuned.parent)
    tokenizer = transformers.AutoTokenizer.from_pretrained(finetuned.parent)
    session = get_runtime("onnxruntime").open(both.folder / "model", TARGETS["cpu"], 1)
    rows = [tokenizer(text, truncation=True, max_length=16, return_tensors="np") for text in texts(recipe_folder)]
    own_answers = np.array([int(session.predict(dict(row))["logits"].argmax()) for row in rows])
    against = {row.model: row for row in both.report.measurements if row.metric == "agreement_against_torch"}
    assert set(against) == set(LABELS) and {row.target for row in against.values()} == {"cpu"}
    assert against["final"].value == pytest.approx((own_answers == expected).mean())
    assert against["baseline"].value == against["onnx"].value == 1
    metric = describe_metric("agreement_against_torch", "ratio")
    assert (metric.title, metric.relative, metric.quality) == ("Agreement against torch", True, False)


def test_torch_stands_in_when_no_target_is_available(recipe_folder: Path, both: Run) -> None:
    alone = ('targets=["gpu"]', "stages=" + json.dumps(STAGES[:1]))
    plan = make_plan(load(recipe_folder / "tiny.yaml", *alone), recipe_folder)
    assert plan.stand_in == "torch" and not plan.targets[0].available
    done = go(recipe_folder, *alone)
    report = json.loads((done.folder / "report.json").read_text())
    assert report["stand_in"] == "torch" and report["skipped"][0]["target"] == "gpu"
    rows = {(row["model"], row["metric"]): row for row in report["measurements"] if row["target"] == "torch"}
    both_rows = both.report.find("final", "accuracy", "torch")
    assert both_rows is not None and rows["final", "accuracy"]["value"] == both_rows.value
    assert rows["final", "latency_ms"]["value"] > 0
    words = closing_line(done.report, done.folder, "tiny")
    assert "torch measured its weights instead, in float32" in words and "CUDAExecutionProvider" in words
    assert done.report.unfit, "what was asked for could not be had"
    overrides = [part for override in alone for part in ("--set", override)]
    result = invoke("run", recipe_folder / "tiny.yaml", "--artifacts", recipe_folder / "artifacts", *overrides)
    assert result.exit_code == 3, result.output


def test_size_is_that_of_stage_output_when_target_file_cannot_be_written(
    recipe_folder: Path, both: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subject, "can_write", lambda form: False)
    done = go(recipe_folder, 'targets=["gpu"]', "stages=" + json.dumps(STAGES[:1]))
    size = done.report.find("final", "size_bytes", "gpu")
    assert size is not None and size.value == size_bytes(done.folder / "model") and done.report.unmeasured


def test_torch_stands_in_when_export_fails(recipe_folder: Path, both: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    real = subject.measurable

    def failing(runner: object, form: str, options: object = None) -> dict[str, Path]:
        if form == "onnx":
            raise StageError("The graph computes otherwise.")
        return real(runner, form)  # type: ignore[arg-type]

    monkeypatch.setattr(subject, "measurable", failing)
    done = go(recipe_folder, 'targets=["cpu"]', "stages=" + json.dumps(STAGES[:1]))
    (skipped,) = done.report.skipped
    assert skipped.failed and skipped.reason == "no file could be written for it. The graph computes otherwise."
    assert done.report.stand_in == "torch" and done.report.find("final", "accuracy", "torch") is not None
    assert done.report.unfit


def test_evaluate_command_accepts_folder_of_weights(recipe_folder: Path, both: Run) -> None:
    (finetuned,) = set((recipe_folder / "artifacts" / "cache").rglob("model.safetensors"))
    command = ("evaluate", finetuned.parent, "--recipe", recipe_folder / "tiny.yaml", "--json", "--target")
    values = {row["metric"]: row["value"] for row in json.loads(output_of(*command, "torch"))}
    known = both.report.find("final", "accuracy", "torch")
    assert known is not None and values["accuracy"] == known.value
    with pytest.raises(InputError, match=r"(?s)cpu does not open SAFETENSORS.*--target that does: torch"):
        output_of(*command, "cpu")


def test_check_asks_format_whether_it_can_write_language_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Path, form: str) -> None:
        raise ModelError(f"{folder.name} has no place in {form}.")

    monkeypatch.setattr(formats, "check_writable", refuse)
    path = tiny_generation.write_all(tmp_path, stages=["gptq"])
    plan = make_plan(load(path), tmp_path, looks_into_model=True)
    assert plan.targets[0].reason == "it runs ONNX files. model has no place in onnx." and plan.stand_in == "torch"
    tiny_generation.write_recipe(tmp_path)
    with pytest.raises(InputError, match="model has no place in onnx"):
        make_plan(load(path), tmp_path, looks_into_model=True)
