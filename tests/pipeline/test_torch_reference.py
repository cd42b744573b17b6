"""Weights measured through transformers: beside other targets as their reference, and where none of them can run."""

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

STAGES = [{"finetune": {"epochs": 1, "batch_size": 8, "learning_rate": 2e-3}}, "onnx", "onnx_int8"]
LABELS = ("baseline", "onnx", "onnx_int8", "final")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe that is measured on the processor and through transformers."""
    folder = tmp_path_factory.mktemp("place")
    write_all(folder, stages=STAGES, targets=["cpu", "torch"])
    return folder


def go(place: Path, *changes: str) -> Run:
    """A run with changes; all share a cache, so that training and timing are done once."""
    return run(load(place / "tiny.yaml", *changes), place, place / "artifacts", Notes())


@pytest.fixture(scope="module")
def both(place: Path) -> Run:
    return go(place)


def texts(place: Path) -> list[str]:
    return [line.rpartition(",")[0] for line in (place / "test.csv").read_text().splitlines()[1:]]


def classes(place: Path, folder: Path) -> np.ndarray:
    """What transformers itself answers with a folder of weights, text by text."""
    module = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        rows = [tokenizer(text, truncation=True, max_length=16, return_tensors="pt") for text in texts(place)]
        return np.array([int(module(**row).logits.argmax()) for row in rows])


def test_weights_are_judged_and_timed_like_any_file(place: Path, both: Run) -> None:
    (finetuned,) = set((place / "artifacts" / "cache").rglob("model.safetensors"))
    answers = classes(place, finetuned.parent)
    labels = [line.rpartition(",")[2] for line in (place / "test.csv").read_text().splitlines()[1:]]
    right = np.mean([tiny_run.LABELS[label_id] == label for label_id, label in zip(answers, labels, strict=True)])
    for model in ("baseline", "final"):
        rows = [row for row in both.report.measurements if (row.model, row.target) == (model, "torch")]
        values = {row.metric: row.value for row in rows}
        assert values["accuracy"] == pytest.approx(right) and values["agreement"] == 1
        assert values["size_bytes"] == sum(path.stat().st_size for path in finetuned.parent.iterdir())
        assert values["latency_ms"] > 0 and values["peak_memory_bytes"] > 5e7
    assert "torch: final is the weights of finetune, which the output of onnx_int8 was made of" in both.report.notes
    assert not (both.folder / "targets").exists(), "weights are in the cache"


def test_other_files_are_compared_with_their_weights(place: Path, both: Run) -> None:
    (finetuned,) = set((place / "artifacts" / "cache").rglob("model.safetensors"))
    expected = classes(place, finetuned.parent)
    tokenizer = transformers.AutoTokenizer.from_pretrained(finetuned.parent)
    session = get_runtime("onnxruntime").open(both.folder / "model", TARGETS["cpu"], 1)
    rows = [tokenizer(text, truncation=True, max_length=16, return_tensors="np") for text in texts(place)]
    own_answers = np.array([int(session.predict(dict(row))["logits"].argmax()) for row in rows])
    against = {row.model: row for row in both.report.measurements if row.metric == "agreement_against_torch"}
    assert set(against) == set(LABELS) and {row.target for row in against.values()} == {"cpu"}
    assert against["final"].value == pytest.approx((own_answers == expected).mean())
    assert against["baseline"].value == against["onnx"].value == 1
    metric = describe_metric("agreement_against_torch", "ratio")
    assert (metric.title, metric.relative, metric.quality) == ("Agreement against torch", True, False)


def test_where_no_target_can_be_had_the_weights_are_measured_in_place(place: Path, both: Run) -> None:
    alone = ('targets=["gpu"]', "stages=" + json.dumps(STAGES[:1]))
    plan = make_plan(load(place / "tiny.yaml", *alone), place)
    assert plan.stand_in == "torch" and not plan.targets[0].available
    done = go(place, *alone)
    report = json.loads((done.folder / "report.json").read_text())
    assert report["stand_in"] == "torch" and report["skipped"][0]["target"] == "gpu"
    rows = {(row["model"], row["metric"]): row for row in report["measurements"] if row["target"] == "torch"}
    both_rows = both.report.find("final", "accuracy", "torch")
    assert both_rows is not None and rows["final", "accuracy"]["value"] == both_rows.value
    assert rows["final", "latency_ms"]["value"] > 0
    words = closing_line(done.report, done.folder, "tiny")
    assert "torch measured its weights in place, in float32" in words and "CUDAExecutionProvider" in words
    assert done.report.unfit, "what was asked for could not be had"
    overrides = [part for override in alone for part in ("--set", override)]
    result = invoke("run", place / "tiny.yaml", "--artifacts", place / "artifacts", *overrides)
    assert result.exit_code == 3, result.output


def test_where_no_file_of_a_target_can_be_written_the_stages_own_are_weighed(
    place: Path, both: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subject, "can_write", lambda form: False)
    done = go(place, 'targets=["gpu"]', "stages=" + json.dumps(STAGES[:1]))
    size = done.report.find("final", "size_bytes", "gpu")
    assert size is not None and size.value == size_bytes(done.folder / "model") and done.report.unmeasured


def test_a_file_that_could_not_be_written_is_named_and_the_weights_are_measured(
    place: Path, both: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = subject.measurable

    def failing(runner: object, form: str, options: object = None) -> dict[str, Path]:
        if form == "onnx":
            raise StageError("The graph computes otherwise.")
        return real(runner, form)  # type: ignore[arg-type]

    monkeypatch.setattr(subject, "measurable", failing)
    done = go(place, 'targets=["cpu"]', "stages=" + json.dumps(STAGES[:1]))
    (skipped,) = done.report.skipped
    assert skipped.failed and skipped.reason == "no file could be written for it. The graph computes otherwise."
    assert done.report.stand_in == "torch" and done.report.find("final", "accuracy", "torch") is not None
    assert done.report.unfit


def test_a_folder_of_weights_is_evaluated_by_itself(place: Path, both: Run) -> None:
    (finetuned,) = set((place / "artifacts" / "cache").rglob("model.safetensors"))
    command = ("evaluate", finetuned.parent, "--recipe", place / "tiny.yaml", "--json", "--target")
    values = {row["metric"]: row["value"] for row in json.loads(output_of(*command, "torch"))}
    known = both.report.find("final", "accuracy", "torch")
    assert known is not None and values["accuracy"] == known.value
    with pytest.raises(InputError, match=r"(?s)cpu does not open SAFETENSORS.*--target that does: torch"):
        output_of(*command, "cpu")


def test_check_asks_a_format_whether_it_has_a_place_for_a_language_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(folder: Path, form: str) -> None:
        raise ModelError(f"{folder.name} has no place in {form}.")

    monkeypatch.setattr(formats, "check_writable", refuse)
    path = tiny_generation.write_all(tmp_path, stages=["gptq"])
    plan = make_plan(load(path), tmp_path, looks_into_model=True)
    assert plan.targets[0].reason == "it runs ONNX files. model has no place in onnx." and plan.stand_in == "torch"
    tiny_generation.write_recipe(tmp_path)
    with pytest.raises(InputError, match="model has no place in onnx"):
        make_plan(load(path), tmp_path, looks_into_model=True)
