"""The real Whisper, whole and in integers: what transformers hears; optimum and transformers.js open the folder."""

from __future__ import annotations

import io
import json
import subprocess
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from foreign_environments import SENTENCE_TRANSFORMERS
from transformers_js_page import ask_page

from compress.checkpoints.checkpoint import Checkpoint
from compress.checkpoints.processor import load_processor
from compress.digests import size_bytes
from compress.formats.onnx.decoder import export_encoder_decoder
from compress.formats.onnx.few_bits import FewBits, quantize_matrices
from compress.formats.onnx.model import few_bits_name, quantized_name
from compress.formats.onnx.quantization import quantize_products
from compress.formats.runtimes import get_runtime
from compress.formats.targets import TARGETS
from compress.samples.fetch import sample_directory
from compress.tasks.audio import Remarks, features_of, read_recording
from compress.tasks.registry import get_task

pytestmark = pytest.mark.slow
DTYPES = {
    "whole": {"encoder_model": "fp32", "decoder_model_merged": "fp32"},
    "integers": {"encoder_model": "q8", "decoder_model_merged": "q4"},
}
TASK = get_task("automatic-speech-recognition")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Whole, and with its encoder in INT8 and its decoder in 4 bits."""
    whole = export_encoder_decoder(Checkpoint(sample_directory("whisper-tiny-en")))
    (encoder, first), (decoder, second) = whole.graphs.items()
    integers = {
        quantized_name(encoder): quantize_products(first, per_channel=True, reduce_range=False),
        few_bits_name(decoder, 4): quantize_matrices(second, FewBits(4, 32))[0],
    }
    found = {}
    for name, model in {"whole": whole, "integers": whole.with_graphs(integers)}.items():
        found[name] = tmp_path_factory.mktemp(name)
        model.save(found[name])
    return found


def recordings() -> list[dict[str, object]]:
    rows: list[dict[str, object]] = pq.read_table(sample_directory("librivox") / "test.parquet").to_pylist()
    return rows


def features(folder: Path) -> list[np.ndarray]:
    processor = load_processor(folder)
    remarks = Remarks()
    samples = [read_recording(row["audio"]["bytes"], 16_000, row["audio"]["path"], remarks) for row in recordings()]
    return [features_of(one, processor.feature_extractor) for one in samples]


@cache
def heard(folder: Path) -> np.ndarray:
    session = get_runtime("onnxruntime").open(folder, TARGETS["cpu"], threads=2)
    answers = [session.predict({"input_features": one[np.newaxis]}) for one in features(folder)]
    return np.array([answer["transcripts"][0] for answer in answers])


def errors(transcripts: np.ndarray) -> float:
    texts = np.array([row["text"] for row in recordings()])
    rows = {row.metric: row.value for row in TASK.measure({"transcripts": transcripts}, texts, "m", "cpu")}
    assert rows["words"] == 71
    return rows["word_errors"]


def test_the_graphs_hear_what_transformers_hears(folders: dict[str, Path]):
    source = sample_directory("whisper-tiny-en")
    model = TASK.load(source, None, trust_remote_code=False)
    expected = []
    for one in features(source):
        ids = model.module.generate(torch.from_numpy(one[np.newaxis]))[0]
        expected.append(model.processor.tokenizer.decode(ids, skip_special_tokens=True).strip())
    assert heard(folders["whole"]).tolist() == expected
    assert errors(heard(folders["whole"])) <= 4


def test_integers_are_five_times_smaller_and_hear_as_well(folders: dict[str, Path]):
    assert size_bytes(folders["integers"]) < 0.2 * size_bytes(folders["whole"])
    assert errors(heard(folders["integers"])) <= 4


def test_optimum_opens_the_same_folder_and_says_the_same_words(folders: dict[str, Path], tmp_path: Path):
    given, answers = tmp_path / "inputs.npz", tmp_path / "answers.npz"
    np.savez(given, inputs=np.stack(features(folders["integers"])[-2:]))
    script = Path(__file__).with_name("optimum_answers.py")
    jobs = [["speech", str(folders["integers"]), "", str(given), str(answers)]]
    SENTENCE_TRANSFORMERS.run(script, json.dumps(jobs))
    tokenizer = load_processor(folders["integers"]).tokenizer
    found = np.load(answers)
    texts = [tokenizer.decode(found[name], skip_special_tokens=True).strip() for name in found.files]
    assert texts == heard(folders["integers"]).tolist()[-2:]


@pytest.mark.browser
def test_a_page_hears_the_same_with_webassembly(library: Path, chromium: str, folders: dict[str, Path]):
    samples, rate = soundfile.read(io.BytesIO(recordings()[4]["audio"]["bytes"]), dtype="float32")
    assert rate == 16_000
    said = ask_page(
        library, chromium, folders["integers"], "transcribe", DTYPES["integers"], ["samples.f32"],
        files={"samples.f32": samples.tobytes()},
    )  # fmt: skip
    assert said == [heard(folders["integers"])[4]]


def test_transformers_js_opens_the_same_folder(library: Path, folders: dict[str, Path], tmp_path: Path):
    samples, rate = soundfile.read(io.BytesIO(recordings()[4]["audio"]["bytes"]), dtype="float32")
    assert rate == 16_000
    (tmp_path / "samples.f32").write_bytes(samples.tobytes())
    for name, folder in folders.items():
        place, script = folder.resolve(), Path(__file__).parent / "transcribe.mjs"
        arguments = [
            str(library),
            str(place.parent),
            place.name,
            json.dumps(DTYPES[name]),
            str(tmp_path / "samples.f32"),
        ]
        done = subprocess.run(["node", str(script), *arguments], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout.splitlines()[-1]) == heard(folder)[4], name
