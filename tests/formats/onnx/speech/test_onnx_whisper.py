"""Tests of Whisper's ONNX graphs: logits are compared with torch, names and axes with those of clients."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from tiny_whisper import FRAMES, write_tiny_whisper

from compress.formats.onnx.decoder import export_encoder_decoder, verify_encoder_decoder
from compress.formats.onnx.model import OnnxModel
from compress.formats.onnx.runtimes.onnxruntime import session_of
from compress.models.checkpoint import Checkpoint

TOKENS = np.array([[256, 3, 17, 200, 91, 5, 66], [256, 8, 9, 10, 250, 0, 1]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_whisper(tmp_path_factory.mktemp("whisper"))


@pytest.fixture(scope="module")
def model(folder: Path) -> OnnxModel:
    return export_encoder_decoder(Checkpoint(folder))


def test_graphs_match_torch_at_once_and_token_by_token(folder: Path, model: OnnxModel) -> None:
    inputs = {"input_features": np.random.default_rng(0).normal(size=(2, 8, FRAMES)).astype(np.float32)}
    parity = verify_encoder_decoder(model, Checkpoint(folder), [inputs], [TOKENS], 1e-4, 0.2)
    assert 0 < parity.difference < 1e-4
    # A client keeps the encoder's keys and values itself once it has them.
    decoder = session_of(list(model.graphs.values())[1])
    feed = {name: np.zeros((2, 2, 0, 32), np.float32) for name in decoder.inputs if name.startswith("past_key_values.")}
    feed |= {"input_ids": TOKENS, "encoder_hidden_states": np.zeros((2, FRAMES // 2, 64), np.float32)}
    results = decoder.predict(feed | {"use_cache_branch": np.array([True])})
    assert {array.size for name, array in results.items() if ".encoder." in name} == {0}


def test_graphs_have_the_names_axes_and_operators_of_clients(model: OnnxModel) -> None:
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
    return {entry.name: [d.dim_param or d.dim_value for d in entry.type.tensor_type.shape.dim] for entry in entries}
