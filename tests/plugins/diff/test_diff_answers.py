"""Tests of the diff command: predictions, first differing layer, settings and limits of two models."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tiny
import torch
from click.testing import Result
from quantized import save_tiny_llama
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from compress.cli import app
from compress.models.model import TorchModel
from compress.plugins.diff.answers import draw_inputs
from compress.plugins.diff.models import check_limits
from compress.plugins.diff.record import AnswersDiff, Diff
from compress.plugins.diff.views import html_diff
from compress.results.report import DataRecord, Report
from compress.tasks.classes import agreement_row, outcome_row
from compress.tasks.registry import TASKS

VALUE = "bert.encoder.layer.1.attention.self.value.weight"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    tiny.encoder().save(folder)
    return folder


@pytest.fixture(scope="module")
def changed(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a copy of the encoder with two value heads of the second layer swapped and multiplied by -4."""
    folder = tmp_path_factory.mktemp("changed")
    shutil.copytree(encoder, folder, dirs_exist_ok=True)
    tensors = load_file(encoder / "model.safetensors")
    tensors[VALUE] = np.concatenate([-4 * tensors[VALUE][np.r_[8:16, 0:8]], tensors[VALUE][16:]])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.csv"
    table = tiny.table(60, seed=7).to_pydict()
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(table)
        writer.writerows(zip(*table.values(), strict=True))
    return path


def ask(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["diff", *map(str, arguments)])


def found(*arguments: object, code: int = 0) -> dict[str, Any]:
    result = ask(*arguments, "--json")
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


@torch.no_grad()
def logits(folder: Path, batch: dict[str, np.ndarray]) -> np.ndarray:
    module = TorchModel.load(folder, TASKS[tiny.TASK]).module.eval()
    return module(**{name: torch.from_numpy(array) for name, array in batch.items()}).logits.numpy()


def test_random_inputs_give_agreement_and_first_layer_of_torch(encoder: Path, changed: Path) -> None:
    diff = found(encoder, changed)
    batches = draw_inputs(encoder, changed).batches
    logits_before, after = (
        np.concatenate([logits(folder, dict(batch)) for batch in batches]) for folder in (encoder, changed)
    )
    rows = {row["metric"]: row for row in diff["answers"]["rows"]}
    assert rows["agreement"]["value"] == pytest.approx((logits_before.argmax(1) == after.argmax(1)).mean())
    assert rows["agreement"]["low"] < rows["agreement"]["value"] < rows["agreement"]["high"]
    p, q = (np.exp(scores) / np.exp(scores).sum(1, keepdims=True) for scores in (logits_before, after))
    assert rows["kl_divergence"]["value"] == pytest.approx((p * np.log(p / q)).sum(1).mean(), rel=1e-4)
    assert {"agreement[tokens=8]", "agreement[tokens=32]"} <= rows.keys()
    assert diff["activations"]["first"] == VALUE.removesuffix(".weight")
    assert diff["first"].startswith(f"encoder.layer.1 ({VALUE})")
    assert len(diff["answers"]["flips"]) == min(20, int((logits_before.argmax(1) != after.argmax(1)).sum()))


def test_data_rows_give_accuracy_slices_and_flipped_texts(encoder: Path, changed: Path, rows: Path) -> None:
    diff = found(encoder, changed, "--data", rows)
    compared = diff["answers"]["comparison"]
    accuracy = next(change for change in compared["changes"] if change["metric"] == "accuracy")
    with rows.open() as file:
        content = list(csv.DictReader(file))
    models = [TorchModel.load(folder, TASKS[tiny.TASK]) for folder in (encoder, changed)]
    scores = [tiny.logits(model, [row["text"] for row in content]) for model in models]
    answers = [[tiny.LABELS[label_id] for label_id in side.argmax(1)] for side in scores]
    right = [[answer == row["label"] for answer, row in zip(side, content, strict=True)] for side in answers]
    assert accuracy["effect"] == pytest.approx(np.mean(right[1]) - np.mean(right[0]))
    assert accuracy["low"] <= accuracy["effect"] <= accuracy["high"] and accuracy["n"] == 60
    assert {change["metric"] for change in compared["changes"]} >= {"accuracy", "calibration_error", "brier_score"}
    assert any(part["name"].startswith("characters=") for part in compared["slices"])
    flips = [row_number for row_number, (old, new) in enumerate(zip(*right, strict=True)) if old != new]
    assert sorted(flip["row"] for flip in compared["flips"]) == flips and flips
    assert all(flip["example"] == content[flip["row"]]["text"] for flip in compared["flips"])
    page = html_diff(Diff.model_validate(diff))
    assert VALUE in page and "By slice and length" in page and content[flips[0]]["text"] in page


def test_missed_limits_set_the_exit_code(encoder: Path, changed: Path) -> None:
    missed = found(encoder, changed, "--depth", "weights", "--at-most", "weights=0.01", code=1)
    worst = max(tensor["unexplained"] for tensor in missed["weights"]["tensors"])
    assert missed["limits"] == [{"name": "weights", "bound": 0.01, "value": worst, "state": "missed"}]
    assert found(encoder, encoder, "--depth", "weights", "--at-most", "weights=0", "--at-most", "fields=0")["limits"]
    limits = found(encoder, changed, "--depth", "weights", "--at-most", "tensors=1", "--at-most", "flips=0.1")["limits"]
    assert [limit["state"] for limit in limits] == ["kept", "not measured"]
    wrong = ask(encoder, changed, "--at-most", "weigts=1")
    assert wrong.exception is not None and "did you mean 'weights'?" in str(wrong.exception)


def test_limit_within_the_interval_is_undecided() -> None:
    # 6 of 48 predictions differ. Wilson: (7/8 + z^2/96) / (1 + z^2/48) and 1.96 sqrt(7/64/48 + z^2/96^2) / (...).
    row = agreement_row(np.arange(48) >= 6, "final", "here")
    assert row.high == pytest.approx(0.84722 + 0.09422, abs=1e-4)
    answers = AnswersDiff(inputs="48", rows=(row,))
    diff = Diff(before="a", after="b", verdict="changed", first="", summary=(), answers=answers)
    for bound, state in ((0.13, "kept"), (0.12, "cannot tell"), (0.07, "cannot tell"), (0.05, "missed")):
        assert check_limits(diff, {"flips": bound})[0].state == state


def test_encoder_and_decoder_are_compared_as_far_as_possible(encoder: Path, tmp_path: Path) -> None:
    save_tiny_llama(tmp_path / "decoder")
    diff = found(encoder, tmp_path / "decoder")
    lacking = " ".join(diff["not_compared"])
    assert "logits [16, 2] and [16, 8, 160]" in lacking and "no module of the same name" in lacking
    assert diff["verdict"] == "changed" and diff["weights"]["removed"] and diff["weights"]["added"]
    assert any(difference["field"] == "model_type" for difference in diff["fields"])


def test_different_settings_and_vocabularies_are_named(encoder: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(encoder, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "layer_norm_eps": 1e-5}))
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words["film"], words["plot"] = words["plot"], words["film"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    diff = found(encoder, other, "--depth", "weights")
    assert diff["weights"]["layers"] == [] and diff["verdict"] == "changed"
    assert diff["first"].startswith("tokenizer.json: vocabulary") and "2 of another id" in diff["first"]
    assert {"file": "config.json", "field": "layer_norm_eps", "before": "1e-12", "after": "1e-05"} in diff["fields"]
    output = ask(encoder, other, "--depth", "files").output
    assert "layer_norm_eps" in output and "weights:" not in output


def test_runs_are_compared_by_recipes_and_reports(encoder: Path, changed: Path, tmp_path: Path) -> None:
    right = [np.r_[np.ones(900), np.zeros(100)], np.r_[np.zeros(40), np.ones(860), np.zeros(100)]]
    for seed, (source, outcomes) in enumerate(zip((encoder, changed), right, strict=True)):
        run = tmp_path / f"run-{seed}"
        shutil.copytree(source, run / "model")
        recipe = {"name": "tiny", "task": tiny.TASK, "model": "m", "seed": seed, "stages": ["onnx"]}
        splits = {"train": "train.csv", "test": "test.csv"}
        (run / "recipe.yaml").write_text(json.dumps({**recipe, "data": {"splits": splits}}))
        measured = outcome_row("accuracy", outcomes, "final", "cpu")
        packages = {"packages": {"torch": f"2.13.{seed}"}}
        data = DataRecord(digest="ab" * 32, rows=1000)
        report = Report(recipe="tiny", measurements=(measured,), data=data, environment=packages)
        (run / "report.json").write_text(report.to_json())
    diff = found(tmp_path / "run-0", tmp_path / "run-1")
    for fields in (("recipe", "seed", "0", "1"), ("report", "packages.torch", "2.13.0", "2.13.1")):
        assert dict(zip(("file", "field", "before", "after"), fields, strict=True)) in diff["fields"]
    (change,) = diff["answers"]["comparison"]["changes"]
    assert change["metric"] == "accuracy" and change["effect"] == pytest.approx(-0.04) and change["verdict"] == "worse"
    # A single changed layer does not come from another seed, so that the layer is named first.
    assert diff["first"].startswith("encoder.layer.1")


def test_folder_without_weights_is_refused(encoder: Path, tmp_path: Path) -> None:
    result = ask(encoder, tmp_path / "nothing")
    assert result.exit_code == 1 and result.exception is not None
    assert "nothing" in str(result.exception)


def test_models_larger_than_memory_are_compared_by_weights_only(
    encoder: Path, changed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=100_000))
    diff = found(encoder, changed)
    assert diff["answers"] is None and diff["weights"]["layers"]
    assert "100 kB are free" in diff["not_compared"][0]
