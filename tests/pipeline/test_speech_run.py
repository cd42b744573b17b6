"""Tests of a complete run of a tiny speech recipe: encoder and decoder graphs, error rates, timings and notes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
from stage_context import write_recipe
from tiny_run import Notes, load
from tiny_speech import write_speech

from compress.formats.onnx.model import find_graphs
from compress.pipeline.run import run
from compress.utils.errors import DataError

STAGES = ({"onnx": {}}, {"onnx_weight_only": {"bits": 8, "part": "encoder"}}, {"onnx_weight_only": {"part": "decoder"}})


def write_all(folder: Path) -> Path:
    splits = write_speech(folder)
    benchmark = {"threads": 1, "budget_seconds": 0.1, "examples": 8, "launches": 2}
    limits = [{"metric": "size_bytes", "at_most": 0.9, "of": "baseline"}]
    return write_recipe(
        folder, "automatic-speech-recognition", splits, STAGES, baseline="start", benchmark=benchmark, limits=limits
    )


def test_speech_recipe_runs_and_is_reported(tmp_path: Path):
    recipe = load(write_all(tmp_path))
    notes = Notes()
    done = run(recipe, tmp_path, tmp_path / "artifacts", notes)
    names = [path.name for path in find_graphs(done.folder / "model")]
    assert names == ["encoder_model_quantized.onnx", "decoder_model_merged_q4.onnx"]
    report = done.report
    for model in ("baseline", "onnx", "final"):
        for metric in ("word_error_rate", "word_error_rate_as_written", "agreement", "size_bytes", "real_time_factor"):
            assert report.find(model, metric, "cpu") is not None, (model, metric)
    assert report.find("onnx", "agreement", "cpu").value == 1
    factor, latency = (report.find("final", metric, "cpu") for metric in ("real_time_factor", "latency_ms"))
    assert 0.2 < factor.value / (latency.value / 1000 / 0.75) < 5, "recordings last three quarters of a second"
    assert [limit.passed for limit in report.limits] == [True]
    assert any("9 recordings" in note and "heard in several windows" in note for note in report.notes)
    assert any("batches are not timed: input_features differ in shape" in note for note in report.notes)
    assert any("differ by at most" in note for note in notes.said)
    again = run(recipe, tmp_path, tmp_path / "artifacts", Notes()).report
    assert all(stage.cached for stage in again.stages)


def test_silent_recording_fails_with_its_file_name(tmp_path: Path):
    path = write_all(tmp_path)
    soundfile.write(tmp_path / "train-1.flac", np.zeros(8_000), 16_000)
    with pytest.raises(DataError, match="silent") as caught:
        run(load(path), tmp_path, tmp_path / "artifacts", Notes())
    assert caught.value.where.endswith("train-1.flac")
