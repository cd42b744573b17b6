"""The selective scan as one node, against a loop over tokens and against transformers' own."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from transformers.models.mamba.modeling_mamba import mamba_selective_scan

from compress.formats.onnx.decoder.graph_builder import GraphBuilder
from compress.formats.onnx.decoder.macro_ops import write_selective_scan
from compress.formats.onnx.runtimes.onnxruntime import session_of

BATCH, CHANNELS, SIZE = 2, 5, 3
AXES: dict[str, list[int | str]] = {
    "state": [BATCH, CHANNELS, SIZE],
    "decays": [CHANNELS, SIZE],
    "step": ["length", BATCH, CHANNELS],
    "value": ["length", BATCH, CHANNELS],
    "input": ["length", BATCH, SIZE],
    "output": ["length", BATCH, SIZE],
}


def some(length: int) -> dict[str, np.ndarray]:
    chance = np.random.default_rng(0)
    shapes = {name: [length if axis == "length" else axis for axis in axes] for name, axes in AXES.items()}
    arrays = {name: chance.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return arrays | {"decays": -np.abs(arrays["decays"]), "step": np.abs(arrays["step"])}


def scan() -> Any:
    nodes = GraphBuilder()
    inputs = [nodes.input(name, ir.DataType.FLOAT, axes) for name, axes in AXES.items()]
    last, outputs = write_selective_scan(nodes, "layers.0.mixer", inputs)
    nodes.output(last, "last", ir.DataType.FLOAT, AXES["state"])
    nodes.output(outputs, "outputs", ir.DataType.FLOAT, AXES["value"])
    return session_of(ir.to_proto(nodes.model("Scan")))


def test_tokens_one_after_the_other() -> None:
    session = scan()
    for length in (1, 7):
        feed = some(length)
        state, outputs = feed["state"].copy(), []
        for token in range(length):
            decay = np.exp(feed["step"][token][:, :, None] * feed["decays"])
            state = decay * state + feed["value"][token][:, :, None] * feed["input"][token][:, None]
            outputs.append((state * feed["output"][token][:, None]).sum(-1))
        actual = session.predict(feed)
        np.testing.assert_allclose(actual["last"], state, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(actual["outputs"], np.stack(outputs), rtol=1e-5, atol=1e-6)


def test_without_a_past_it_is_transformers_own_and_a_text_may_come_in_parts() -> None:
    session, feed = scan(), some(6) | {"state": np.zeros((BATCH, CHANNELS, SIZE), np.float32)}
    hidden = feed["value"] / feed["step"]
    turned = [torch.from_numpy(sequence).permute(1, 2, 0) for sequence in (hidden, feed["step"])]
    read = [torch.from_numpy(feed[name]).permute(1, 2, 0) for name in ("input", "output")]
    expected, last = mamba_selective_scan(*turned, torch.from_numpy(feed["decays"]), *read, return_last_state=True)
    whole = session.predict(feed)
    np.testing.assert_allclose(whole["outputs"], expected.permute(2, 0, 1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(whole["last"], last, rtol=1e-4, atol=1e-5)
    parts = {name: np.split(array, [4]) for name, array in feed.items() if "length" in AXES[name]}
    first = session.predict(feed | {name: pair[0] for name, pair in parts.items()})
    second = session.predict(feed | {name: pair[1] for name, pair in parts.items()} | {"state": first["last"]})
    np.testing.assert_allclose(np.concatenate([first["outputs"], second["outputs"]]), whole["outputs"], atol=1e-6)
