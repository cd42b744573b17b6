"""Tests of speech recognition: features compared with the model's extractor, error rates with jiwer."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import jiwer
import numpy as np
import pyarrow as pa
import pytest
import soundfile
from tiny_whisper import FRAMES, write_tiny_whisper

from compress.data.media import media_type
from compress.models.processor import load_processor
from compress.recipe.policy import Margin
from compress.report.compare.effects import MeasurementPair, is_paired
from compress.tasks.registry import TASKS
from compress.utils.errors import DataError

TASK = TASKS["automatic-speech-recognition"]
RATE = 16_000
SAID = np.array(["Dial 9, then the area code.", "He's the colour of money!", "Thank you"])
HEARD = np.array(["dial nine then the area code", "he is the color of honey", "thank you"])


def recording(seconds: float, rate: int = RATE) -> dict[str, object]:
    samples = np.random.default_rng(int(10 * seconds)).normal(0, 0.1, int(seconds * rate)).astype(np.float32)
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format="WAV", subtype="FLOAT")
    content = buffer.getvalue()
    return {"bytes": content, "path": None, "sha256": hashlib.sha256(content).hexdigest()}


def rows(*recordings: dict[str, object]) -> pa.Table:
    return pa.table({"audio": pa.array(recordings, media_type()), "text": ["some words"] * len(recordings)})


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory):
    return load_processor(write_tiny_whisper(tmp_path_factory.mktemp("whisper")))


def test_features_equal_model_extractor(processor):
    given = recording(0.7)
    examples = TASK.encode(rows(given), processor, None, 128)
    samples, _ = soundfile.read(io.BytesIO(given["bytes"]), dtype="float32")
    expected = processor.feature_extractor(samples, sampling_rate=RATE, return_tensors="np")["input_features"][0]
    assert (examples.inputs[0]["input_features"] == expected).all()
    assert examples.seconds == pytest.approx([0.7])
    assert examples.labels.tolist() == ["some words"]


def test_long_recordings_are_split_and_resampling_is_reported(processor):
    examples = TASK.encode(rows(recording(0.5), recording(2.5), recording(0.5, 8_000)), processor, None, 128)
    frames = [example["input_features"].shape[-1] for example in examples.inputs]
    assert frames[0] == frames[2] == FRAMES
    assert frames[1] in (3 * FRAMES, 4 * FRAMES)
    assert "3 recordings" in examples.note
    assert "1 heard in several windows" in examples.note
    assert "1 resampled from 8,000 to 16,000 Hz" in examples.note


def test_error_rates_equal_jiwer_on_normalized_words():
    measured = {row.metric: row for row in TASK.measure({"transcripts": HEARD}, SAID, "m", "cpu")}
    # Numbers become digits and contractions are expanded; "colour" stays, since there is no spelling table.
    expected = jiwer.process_words(
        ["dial 9 then the area code", "he is the colour of money", "thank you"],
        ["dial 9 then the area code", "he is the color of honey", "thank you"],
    )
    assert measured["word_error_rate"].value == pytest.approx(expected.wer)
    assert (measured["word_errors"].value, measured["words"].value) == (2, 14)
    as_written = jiwer.process_words(list(SAID), list(HEARD))
    assert measured["word_error_rate_as_written"].value == pytest.approx(as_written.wer)
    assert measured["word_error_rate"].low <= measured["word_error_rate"].value <= measured["word_error_rate"].high


def test_error_rates_are_paired_by_utterance():
    rate = TASK.measure({"transcripts": HEARD}, SAID, "m", "cpu")[0]
    better = TASK.measure({"transcripts": SAID}, SAID, "m", "cpu")[0]
    assert better.value == 0
    assert np.mean(rate.raw) == pytest.approx(rate.value)
    assert is_paired(MeasurementPair(rate, better, Margin(0.01, relative=False)))


def test_agreement_is_exact_and_baseline_error_rate_normalized():
    compared = {
        row.metric: row.value for row in TASK.compare({"transcripts": HEARD}, {"transcripts": SAID}, "m", "cpu")
    }
    assert compared["agreement"] == 0
    assert compared["word_error_rate_to_baseline"] == pytest.approx(2 / 14)
    same = {row.metric: row.value for row in TASK.compare({"transcripts": SAID}, {"transcripts": SAID}, "m", "cpu")}
    assert (same["agreement"], same["word_error_rate_to_baseline"]) == (1, 0)


def test_rows_without_texts_are_rejected(processor):
    examples = TASK.encode(rows(recording(0.5)).select(["audio"]), processor, None, 128)
    with pytest.raises(DataError, match="no texts"):
        TASK.collect({"transcripts": HEARD[:1]}, examples, [0])


def test_folder_loads_as_torch_model(tmp_path: Path):
    model = TASK.load(write_tiny_whisper(tmp_path), None, trust_remote_code=False)
    assert model.module.config.model_type == "whisper"
    assert model.processor.feature_extractor.n_samples == RATE
