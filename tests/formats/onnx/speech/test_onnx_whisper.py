from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from tiny_whisper import FRAMES, write_tiny_whisper
from transformers import WhisperForConditionalGeneration

from compress.formats.onnx.decoder import export_encoder_decoder
from compress.formats.onnx.model import OnnxModel
from compress.models.checkpoint import Checkpoint

TOKENS = np.array([[256, 3, 17, 200, 91, 5, 66], [256, 8, 9, 10, 250, 0, 1]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_whisper(tmp_path_factory.mktemp("whisper"))


@pytest.fixture(scope="module")
def model(folder: Path) -> OnnxModel:
    return export_encoder_decoder(Checkpoint(folder))


def _session(graph) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])


def _features() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(2, 8, FRAMES)).astype(np.float32)


def test_graphs_equal_torch_in_one_go_and_token_by_token(folder: Path, model: OnnxModel) -> None:
    module = WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = module(torch.from_numpy(_features()), decoder_input_ids=torch.from_numpy(TOKENS))
    encoder, decoder = map(_session, model.graphs.values())
    (hidden,) = encoder.run(None, {"input_features": _features()})
    assert np.abs(hidden - expected.encoder_last_hidden_state.numpy()).max() < 1e-4

    past = {
        entry.name: np.zeros((2, 2, 0, 32), np.float32)
        for entry in decoder.get_inputs()
        if entry.name.startswith("past_key_values.")
    }
    outputs = [output.name for output in decoder.get_outputs()]
    logits = []
    for step, tokens in enumerate((TOKENS[:, :3], *(TOKENS[:, at : at + 1] for at in range(3, 7)))):
        feed = {"input_ids": tokens, "encoder_hidden_states": hidden, "use_cache_branch": np.array([step > 0]), **past}
        results = dict(zip(outputs, decoder.run(None, feed), strict=True))
        logits.append(results["logits"])
        for name in past:
            if step == 0 or ".decoder." in name:
                past[name] = results[name.replace("past_key_values", "present")]
            else:
                assert results[name.replace("past_key_values", "present")].size == 0
    difference = np.abs(np.concatenate(logits, axis=1) - expected.logits.numpy()).max()
    assert difference < 1e-4, difference
    assert expected.logits.std() > 0.1, "the model tells tokens apart"


def test_graphs_have_the_names_axes_and_operators_that_clients_know(model: OnnxModel) -> None:
    encoder, decoder = model.graphs.values()
    assert list(model.graphs) == ["encoder_model.onnx", "decoder_model_merged.onnx"]
    assert _axes(encoder.graph.input) == {"input_features": ["batch_size", 8, FRAMES]}
    assert _axes(encoder.graph.output) == {"last_hidden_state": ["batch_size", FRAMES // 2, 64]}
    inputs = _axes(decoder.graph.input)
    assert list(inputs)[:4] == [
        "input_ids",
        "encoder_hidden_states",
        "past_key_values.0.decoder.key",
        "past_key_values.0.decoder.value",
    ]
    assert inputs["past_key_values.1.encoder.value"] == ["batch_size", 2, "past_encoder_sequence_length", 32]
    assert inputs["use_cache_branch"] == [1] and len(inputs) == 2 + 8 + 1
    assert _axes(decoder.graph.output)["logits"] == ["batch_size", "decoder_sequence_length", 258]
    # A step reads 21 matrices, and what only the first reads lies in the branches.
    kinds = Counter(node.op_type for node in decoder.graph.node)
    assert (kinds["MatMul"], kinds["If"], kinds["MultiHeadAttention"]) == (8 * 2 + 1, 2, 2)
    whole = Counter(node.op_type for node in ir.traversal.RecursiveGraphIterator(ir.from_proto(decoder).graph))
    assert (whole["MatMul"], whole["MultiHeadAttention"]) == (10 * 2 + 1, 2 + 2 * 2)


def _axes(entries) -> dict[str, list[int | str]]:
    return {
        entry.name: [axis.dim_param or axis.dim_value for axis in entry.type.tensor_type.shape.dim] for entry in entries
    }
