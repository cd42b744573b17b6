"""Tests of complete runs of audio models: a spectrogram classifier with its bundle, and a CTC speech recognizer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from stage_context import write_recipe
from tiny_run import compress, latest, read_report
from tiny_sounds import spectrograms, waves, write_model, write_splits

from compress.results.report import BASELINE, FINAL

pytestmark = pytest.mark.slow

TRAINED = {"batch_size": 8, "learning_rate": 3e-3}
CLASSIFIED: list[Any] = [{"finetune": {"epochs": 8, **TRAINED}}, {"qat": {"epochs": 1, **TRAINED}}]
SPELLED: list[Any] = [{"finetune": {"epochs": 1, **TRAINED}}, {"onnx": {}}, {"onnx_int8": {}}]


def recipe(folder: Path, task: str, stages: list[Any], judged: int = 16) -> Path:
    write_splits(folder, {"train": 32, "validation": 8, "test": judged})
    benchmark = {"threads": 1, "seconds": 0.05, "examples": 8, "batch_size": 4, "launches": 2, "every_stage": False}
    splits = ("train", "validation", "test")
    return write_recipe(folder, task, splits, stages, baseline="finetune", benchmark=benchmark)


def run(path: Path) -> dict[tuple[str, str], Any]:
    done = compress("run", path, "--artifacts", path.parent / "artifacts")
    assert done.returncode == 0, done.stderr
    return {(row["model"], row["metric"]): row for row in read_report(path.parent / "artifacts")["measurements"]}


def test_spectrogram_classifier_is_quantized_and_bundled(tmp_path: Path) -> None:
    write_model(tmp_path / "model", lambda: spectrograms(head=False))
    path = recipe(tmp_path, "audio-classification", CLASSIFIED, judged=40)  # 20 rows make a label a slice
    rows = run(path)
    assert rows[BASELINE, "accuracy"]["value"] >= 0.9  # the classes are two distant pitches
    assert rows[FINAL, "accuracy"]["value"] >= 0.75
    assert rows[FINAL, "size_bytes"]["value"] < 0.7 * rows[BASELINE, "size_bytes"]["value"]
    assert {"accuracy[label=high]", "accuracy[label=low]", "f1"} <= {metric for model, metric in rows if model == FINAL}
    ran = latest(tmp_path / "artifacts")
    pytest.importorskip("compress.plugins.apps")
    bundle = tmp_path / "app"
    sample = tmp_path / "test-0.wav"
    done = compress("bundle", ran, "--target", "desktop", "--output", bundle, "--sample", sample)
    assert done.returncode == 0, done.stderr
    alone = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    for arguments in (["--selftest"], [str(sample)]):
        command = [sys.executable, str(bundle / "examples" / "run.py"), *arguments]
        printed = subprocess.run(command, env=alone, capture_output=True, text=True, check=False)
        assert printed.returncode == 0, printed.stderr
    assert "high" in printed.stdout and "low" in printed.stdout


def test_ctc_model_is_trained_and_quantized_as_one_graph(tmp_path: Path) -> None:
    write_model(tmp_path / "model", lambda: waves("Wav2Vec2", masked=False, ending="CTC"), letters=True)
    path = recipe(tmp_path, "automatic-speech-recognition", SPELLED)
    rows = run(path)
    for metric in ("word_error_rate", "character_error_rate", "word_accuracy"):
        assert rows[BASELINE, metric]["n"] == len(rows[FINAL, metric]["raw"]) == 16
    assert rows[FINAL, "agreement"]["n"] == 16
    graphs = (latest(tmp_path / "artifacts") / "model").rglob("*.onnx")
    assert [file.name for file in graphs] == ["model_quantized.onnx"]
    pytest.importorskip("compress.plugins.apps")
    refused = compress("bundle", latest(tmp_path / "artifacts"), "--target", "desktop", "--output", tmp_path / "app")
    assert refused.returncode == 2 and "no app yet for a wav2vec2 of automatic-speech-recognition" in refused.stderr
