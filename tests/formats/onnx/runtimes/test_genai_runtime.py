"""Tests of onnxruntime-genai as a runtime: logits and tokens are compared with transformers and ONNX Runtime."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quantized import VOCABULARY, quantize_tiny_llama, save_tiny_llama
from written_decoders import (
    by_transformers,
    check_refused_batches,
    greedy_tokens,
    logits_of,
    random_ids,
    tokens_of_transformers,
)

from compress.formats.generation.decoder import feeder, open_decoder
from compress.formats.onnx.decoder import GraphSettings, export_decoder
from compress.formats.onnx.model import GENAI_CONFIG, OnnxModel
from compress.formats.onnx.runtimes import genai as onnxruntime_genai
from compress.formats.onnx.runtimes.genai import OnnxGenaiSession
from compress.formats.runtime import get_runtime, why_unavailable
from compress.formats.targets import TARGETS
from compress.models.checkpoint import Checkpoint
from compress.utils.errors import InputError, MissingExtraError, ModelError

pytest.importorskip("onnxruntime_genai")
TARGET, POSITIONS = TARGETS["genai"], 1024


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Return an fp32 decoder with more positions than the cache initially allocates."""
    return save_tiny_llama(tmp_path_factory.mktemp("source"), max_position_embeddings=POSITIONS)


@pytest.fixture(scope="module")
def exact(source: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the exported folder of the decoder."""
    folder = tmp_path_factory.mktemp("exact")
    export_decoder(source, GraphSettings(accuracy_level=1)).save(folder)
    return folder


@pytest.fixture(scope="module")
def session(exact: Path) -> OnnxGenaiSession:
    return opened(exact)


def opened(folder: Path) -> OnnxGenaiSession:
    session = get_runtime("onnxruntime-genai").open(folder, TARGET, 1)
    assert isinstance(session, OnnxGenaiSession)
    return session


def test_logits_at_every_position_match_transformers(session: OnnxGenaiSession, source: Checkpoint) -> None:
    tokens = random_ids(3, 70)
    logits = session.predict({"input_ids": tokens, "attention_mask": np.ones_like(tokens)})["logits"]
    assert logits.shape == (3, 70, VOCABULARY) and logits.dtype == np.float32
    np.testing.assert_allclose(logits, logits_of(by_transformers(source), tokens), atol=1e-4)
    # A row does not depend on the previous one.
    np.testing.assert_array_equal(session.predict({"input_ids": tokens[1:2]})["logits"][0], logits[1])


def test_quantized_logits_match_onnx_runtime(source: Checkpoint, tmp_path: Path) -> None:
    export_decoder(quantize_tiny_llama(source, tmp_path / "quantized")).save(tmp_path)
    tokens = random_ids(2, 40)
    plain = get_runtime("onnxruntime").open(tmp_path, TARGETS["cpu"], 1)
    batch = {"input_ids": tokens, "attention_mask": np.ones_like(tokens)}
    expected = plain.predict(feeder(plain, "")(batch))["logits"]
    np.testing.assert_allclose(opened(tmp_path).predict(batch)["logits"], expected, atol=1e-5)


def test_greedy_tokens_match_transformers(session: OnnxGenaiSession, source: Checkpoint) -> None:
    decoder, module = open_decoder(session, "here"), by_transformers(source)
    prompt = random_ids(1, 500)[0].tolist()
    for start in (prompt[:7], prompt):
        assert greedy_tokens(decoder, start, 24) == tokens_of_transformers(module, start, 24)
    assert decoder.cached and decoder.vocabulary == VOCABULARY
    # The end-of-sequence token is processed like any other.
    whole = torch.tensor([[*prompt[:7], 2, 9]])
    decoder.prefill(prompt[:7])
    decoder.step(2)
    assert decoder.step(9) == int(module(whole).logits[0, -1].argmax())


def test_invalid_batches_are_refused(session: OnnxGenaiSession) -> None:
    check_refused_batches(session, VOCABULARY)
    with pytest.raises(InputError, match=f"{POSITIONS + 1} tokens exceeds the model's context length"):
        session.decoder().prefill([5] * (POSITIONS + 1))
    # The longest possible input is accepted.
    assert session.predict({"input_ids": random_ids(1, POSITIONS)})["logits"].shape[1] == POSITIONS


def changed(folder: Path, to: Path, **model: Any) -> Path:
    """Copy a folder, change entries of the model in its genai_config.json and return the copy."""
    shutil.copytree(folder, to)
    config = json.loads((to / GENAI_CONFIG).read_text())
    config["model"] |= model
    (to / GENAI_CONFIG).write_text(json.dumps(config))
    return to


def test_invalid_folders_are_refused(exact: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    decoder = json.loads((exact / GENAI_CONFIG).read_text())["model"]["decoder"]
    with pytest.raises(InputError, match="0 threads"):
        get_runtime("onnxruntime-genai").open(exact, TARGET, 0)
    with pytest.raises(ModelError, match=r"has no genai_config\.json"):
        opened(tmp_path)
    for number, (entries, words) in enumerate(
        (
            ({"decoder": {**decoder, "filename": "../other.onnx"}}, r"names the graph \.\./other\.onnx"),
            ({"decoder": {}}, "describes no decoder"),
            ({"vocab_size": "many"}, "describes no decoder"),
            ({"type": "nonsense"}, "cannot open the model: Unsupported model_type"),
        )
    ):
        with pytest.raises(ModelError, match=words):
            opened(changed(exact, tmp_path / str(number), **entries))
    graph = changed(exact, tmp_path / "cut") / "onnx" / "model.onnx"
    graph.write_bytes(graph.read_bytes()[:-5000])
    with pytest.raises(ModelError, match=r"cannot open the model: .*arsing failed"):
        opened(tmp_path / "cut")
    assert capfd.readouterr().err == ""


def test_folder_naming_a_custom_ops_library_is_refused(exact: Path, tmp_path: Path) -> None:
    decoder = json.loads((exact / GENAI_CONFIG).read_text())["model"]["decoder"]
    options = {**decoder["session_options"], "custom_ops_library": str(tmp_path / "any.so")}
    folder = changed(exact, tmp_path / "copy", decoder={**decoder, "session_options": options})
    with pytest.raises(ModelError, match="names a library to be loaded"):
        opened(folder)


def test_genai_config_follows_a_renamed_graph(exact: Path, tmp_path: Path) -> None:
    model = OnnxModel.load(exact, "text-generation")
    model.with_graphs({"model_q4.onnx": model.graph}).save(tmp_path)
    assert [path.name for path in (tmp_path / "onnx").iterdir()] == ["model_q4.onnx"]
    assert opened(tmp_path).decoder().prefill([5, 6]) == opened(exact).decoder().prefill([5, 6])


def test_target_is_unavailable_without_the_package(exact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert why_unavailable(TARGET) is None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    onnxruntime_genai._library.cache_clear()
    assert "pip install 'compress-models[genai]'" in str(why_unavailable(TARGET))
    with pytest.raises(MissingExtraError, match="genai"):
        opened(exact)
    monkeypatch.undo()
    assert opened(exact).settings["intra_op_threads"] == 1
