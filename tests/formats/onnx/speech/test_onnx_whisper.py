from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from tiny_whisper import FRAMES, write_tiny_whisper
from transformers import WhisperForConditionalGeneration

from compress.checkpoints.checkpoint import Checkpoint
from compress.formats.onnx.speech.architecture import read_architecture
from compress.formats.onnx.speech.decoder import write_decoder
from compress.formats.onnx.speech.encoder import write_encoder

TOKENS = np.array([[256, 3, 17, 200, 91, 5, 66], [256, 8, 9, 10, 250, 0, 1]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_whisper(tmp_path_factory.mktemp("whisper"))


def _session(graph) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])


def _features() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(2, 8, FRAMES)).astype(np.float32)


def test_graphs_equal_torch_in_one_go_and_token_by_token(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    of = read_architecture(checkpoint)
    module = WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = module(torch.from_numpy(_features()), decoder_input_ids=torch.from_numpy(TOKENS))
    (hidden,) = _session(write_encoder(checkpoint, of, 4)).run(None, {"input_features": _features()})
    assert np.abs(hidden - expected.encoder_last_hidden_state.numpy()).max() < 1e-4

    decoder = _session(write_decoder(checkpoint, of, 4))
    past = {
        entry.name: np.zeros((2, 2, 0, 32), np.float32)
        for entry in decoder.get_inputs()
        if entry.name.startswith("past_key_values.")
    }
    outputs = [output.name for output in decoder.get_outputs()]
    logits = []
    for step, tokens in enumerate((TOKENS[:, :3], *(TOKENS[:, at : at + 1] for at in range(3, 7)))):
        feed = {"input_ids": tokens, "encoder_hidden_states": hidden, "use_cache_branch": np.array([step > 0]), **past}
        found = dict(zip(outputs, decoder.run(None, feed), strict=True))
        logits.append(found["logits"])
        for name in past:
            if step == 0 or ".decoder." in name:
                past[name] = found[name.replace("past_key_values", "present")]
    difference = np.abs(np.concatenate(logits, axis=1) - expected.logits.numpy()).max()
    assert difference < 1e-4, difference
    assert expected.logits.std() > 0.1, "the model tells tokens apart"
