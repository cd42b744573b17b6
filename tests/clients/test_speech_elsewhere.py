"""Tests of Whisper tiny.en in float and quantized: transcripts in optimum and transformers.js match transformers."""

from __future__ import annotations

import io
import json
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from foreign_environments import SENTENCE_TRANSFORMERS
from transformers_js_page import ask_page, run_node

from compress.data.samples.fetch import sample_directory
from compress.formats.runtime import get_runtime
from compress.formats.targets import TARGETS
from compress.models.processor import load_processor
from compress.tasks.audio import Remarks, features_of, read_recording
from compress.tasks.registry import TASKS
from compress.utils.storage import size_bytes

pytestmark = pytest.mark.slow
DTYPES = {
    "whole": {"encoder_model": "fp32", "decoder_model_merged": "fp32"},
    "integers": {"encoder_model": "q8", "decoder_model_merged": "q4"},
}
TASK = TASKS["automatic-speech-recognition"]


def recordings() -> list[dict[str, object]]:
    rows: list[dict[str, object]] = pq.read_table(sample_directory("librivox") / "test.parquet").to_pylist()
    return rows


def features(folder: Path) -> list[np.ndarray]:
    processor = load_processor(folder)
    remarks = Remarks()
    samples = [read_recording(row["audio"]["bytes"], 16_000, row["audio"]["path"], remarks) for row in recordings()]
    return [features_of(sample, processor.feature_extractor) for sample in samples]


@cache
def transcribed(folder: Path) -> np.ndarray:
    session = get_runtime("onnxruntime").open(folder, TARGETS["cpu"], threads=2)
    answers = [session.predict({"input_features": sample_features[np.newaxis]}) for sample_features in features(folder)]
    return np.array([answer["transcripts"][0] for answer in answers])


def errors(transcripts: np.ndarray) -> float:
    texts = np.array([row["text"] for row in recordings()])
    rows = {row.metric: row.value for row in TASK.measure({"transcripts": transcripts}, texts, "m", "cpu")}
    assert rows["words"] == 71
    return rows["word_errors"]


def test_transcripts_match_transformers(whisper: dict[str, Path]):
    source = sample_directory("whisper-tiny-en")
    model = TASK.load(source, None, trust_remote_code=False)
    expected = []
    for sample_features in features(source):
        ids = model.module.generate(torch.from_numpy(sample_features[np.newaxis]))[0]
        expected.append(model.processor.tokenizer.decode(ids, skip_special_tokens=True).strip())
    assert transcribed(whisper["whole"]).tolist() == expected
    assert errors(transcribed(whisper["whole"])) <= 4


def test_quantized_whisper_is_a_fifth_in_size_and_as_accurate(whisper: dict[str, Path]):
    assert size_bytes(whisper["integers"]) < 0.2 * size_bytes(whisper["whole"])
    assert errors(transcribed(whisper["integers"])) <= 4


def test_optimum_transcribes_the_same_words(whisper: dict[str, Path], tmp_path: Path):
    given, answers = tmp_path / "inputs.npz", tmp_path / "answers.npz"
    np.savez(given, inputs=np.stack(features(whisper["integers"])[-2:]))
    script = Path(__file__).with_name("optimum_answers.py")
    jobs = [["speech", str(whisper["integers"]), "", str(given), str(answers)]]
    SENTENCE_TRANSFORMERS.run(script, json.dumps(jobs))
    tokenizer = load_processor(whisper["integers"]).tokenizer
    stored_answers = np.load(answers)
    texts = [tokenizer.decode(stored_answers[name], skip_special_tokens=True).strip() for name in stored_answers.files]
    assert texts == transcribed(whisper["integers"]).tolist()[-2:]


@pytest.mark.browser
def test_page_with_webassembly_transcribes_the_same(library: Path, chromium: str, whisper: dict[str, Path]):
    samples, rate = soundfile.read(io.BytesIO(recordings()[4]["audio"]["bytes"]), dtype="float32")
    assert rate == 16_000
    page_answer = ask_page(
        library, chromium, whisper["integers"], "transcribe", DTYPES["integers"], ["samples.f32"],
        files={"samples.f32": samples.tobytes()},
    )  # fmt: skip
    assert page_answer == [transcribed(whisper["integers"])[4]]


def test_transformers_js_in_node_transcribes_the_same(library: Path, whisper: dict[str, Path], tmp_path: Path):
    samples, rate = soundfile.read(io.BytesIO(recordings()[4]["audio"]["bytes"]), dtype="float32")
    assert rate == 16_000
    (tmp_path / "samples.f32").write_bytes(samples.tobytes())
    for name, folder in whisper.items():
        location, dtypes = folder.resolve(), json.dumps(DTYPES[name])
        arguments = (library, location.parent, location.name, dtypes, tmp_path / "samples.f32")
        assert run_node("transcribe.mjs", *arguments) == transcribed(folder)[4], name
