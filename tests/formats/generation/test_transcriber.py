"""Tests of greedy transcription with two ONNX graphs: tokens are compared with transformers' `generate`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_whisper import END, FRAMES, START, write_tiny_whisper
from transformers import WhisperForConditionalGeneration

from compress.formats.generation.speech_recognition import read_rules
from compress.formats.onnx.decoder import export_encoder_decoder
from compress.formats.onnx.model import OnnxModel, find_graphs
from compress.formats.runtime import Session, get_runtime
from compress.formats.targets import TARGETS
from compress.models.checkpoint import Checkpoint
from compress.utils.errors import InputError, ModelError

CPU = TARGETS["cpu"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_whisper(tmp_path_factory.mktemp("whisper"))


@pytest.fixture(scope="module")
def artifact(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifact")
    export_encoder_decoder(Checkpoint(source)).save(folder)
    return folder


def opened(folder: Path) -> Session:
    return get_runtime("onnxruntime").open(folder, CPU, threads=1)


def features(count: int = 3, windows: int = 1) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(count, 8, windows * FRAMES)).astype(np.float32)


def tokens_of_generate(source: Path, batch: np.ndarray) -> list[list[int]]:
    module = WhisperForConditionalGeneration.from_pretrained(source, dtype=torch.float32).eval()
    found = []
    for row in batch:
        ids = module.generate(torch.from_numpy(row[np.newaxis]), do_sample=False, num_beams=1)[0].tolist()
        ids = ids[1:] if ids[0] == START else ids
        found.append(ids[: ids.index(END)] if END in ids else ids)
    return found


def transcribed_tokens(folder: Path, batch: np.ndarray) -> list[list[int]]:
    sequences = opened(folder).predict({"input_features": batch})["sequences"]
    return [[token for token in row if token >= 0] for row in sequences.tolist()]


def test_tokens_match_generate(source: Path, artifact: Path):
    expected = tokens_of_generate(source, features())
    assert transcribed_tokens(artifact, features()) == expected
    assert len({tuple(row) for row in expected}) > 1, "recordings are told apart"


def test_suppressed_tokens_are_not_generated(artifact: Path, tmp_path: Path):
    folder = shutil.copytree(artifact, tmp_path / "artifact")
    rules = json.loads((artifact / "generation_config.json").read_text())
    free = transcribed_tokens(artifact, features())
    unwanted = sorted({row[0] for row in free})
    (folder / "generation_config.json").write_text(json.dumps({**rules, "suppress_tokens": unwanted}))
    bound = transcribed_tokens(folder, features())
    assert not {token for row in bound for token in row} & set(unwanted)
    assert bound != free


def test_long_recording_is_transcribed_window_by_window(artifact: Path):
    long = features(1, windows=2)
    first, second = (transcribed_tokens(artifact, long[..., at : at + FRAMES])[0] for at in (0, FRAMES))
    assert transcribed_tokens(artifact, long) == [first + second]


def test_features_of_another_length_are_refused(artifact: Path):
    with pytest.raises(InputError, match=r"(?s)shape.*a multiple of 100"):
        transcribed_tokens(artifact, features()[..., :-1])


def test_saved_folder_has_both_graphs_and_reloads(artifact: Path, tmp_path: Path):
    names = ["encoder_model.onnx", "decoder_model_merged.onnx"]
    assert [path.name for path in find_graphs(artifact)] == names
    loaded = OnnxModel.load(artifact, "automatic-speech-recognition")
    assert list(loaded.graphs) == names
    loaded.save(tmp_path)
    for path in artifact.rglob("*.*"):
        assert (tmp_path / path.relative_to(artifact)).read_bytes() == path.read_bytes()


def test_missing_encoder_graph_is_named(artifact: Path, tmp_path: Path):
    model = OnnxModel.load(artifact, "automatic-speech-recognition")
    OnnxModel(model.graph, model.file_name, model.companions).save(tmp_path)
    with pytest.raises(ModelError, match=r"encoder_model\.onnx") as caught:
        opened(tmp_path)
    assert "decoder_model_merged" in str(caught.value)


def test_multilingual_prompt_contains_language_and_task(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    tokens = {"decoder_start_token_id": 50258, "eos_token_id": 50257, "no_timestamps_token_id": 50363}
    languages = {"lang_to_id": {"<|de|>": 50261, "<|en|>": 50259}, "is_multilingual": True, "language": "de"}
    config = tokens | languages | {"task_to_id": {"transcribe": 50359, "translate": 50358}}
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    assert read_rules(tmp_path).prompt == (50258, 50261, 50359, 50363)
    (tmp_path / "generation_config.json").write_text(json.dumps({**config, "language": "xx"}))
    with pytest.raises(ModelError, match="xx"):
        read_rules(tmp_path)
