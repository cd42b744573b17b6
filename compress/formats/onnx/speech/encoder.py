"""The graph of Whisper's encoder.

Input `input_features` [batch, features, frames]; output `last_hidden_state` [batch, positions, hidden], as
transformers.js and optimum name them.
"""

from __future__ import annotations

import onnx
import onnx_ir as ir

from compress.checkpoints.checkpoint import Checkpoint
from compress.formats.onnx.decoder.nodes import Nodes
from compress.formats.onnx.decoder.weights import Weights
from compress.formats.onnx.speech.architecture import WhisperArchitecture
from compress.formats.onnx.speech.layers import Layers

_SCOPE = "model.encoder"


def write_encoder(checkpoint: Checkpoint, of: WhisperArchitecture, accuracy_level: int) -> onnx.ModelProto:
    """The encoder of a checkpoint. Raises `ModelError` for a weight that is missing."""
    nodes = Nodes()
    layers = Layers(nodes, Weights(checkpoint, nodes, accuracy_level), of.encoder.heads)
    features = nodes.input("input_features", ir.DataType.FLOAT, ["batch_size", of.features, of.frames])
    value = _convolve(nodes, checkpoint, "conv1", features, stride=1)
    value = _convolve(nodes, checkpoint, "conv2", value, stride=2)
    value = nodes.op("Transpose", f"{_SCOPE}.conv2", [value], perm=[0, 2, 1])
    positions = layers.weights.vector(f"{_SCOPE}.embed_positions.weight")
    stream = nodes.op("Add", f"{_SCOPE}.embed_positions", [value, positions])
    for layer in range(of.encoder.layers):
        scope = f"{_SCOPE}.layers.{layer}"
        own = f"{scope}.self_attn"
        normed = layers.norm(f"{scope}.self_attn_layer_norm", stream)
        (attended,) = layers.attend(own, *[layers.project(own, f"{kind}_proj", normed) for kind in "qkv"])
        stream = layers.add(own, stream, layers.project(own, "out_proj", attended))
        stream = layers.feed_forward(scope, stream)
    normed = layers.norm(f"{_SCOPE}.layer_norm", stream)
    nodes.output(normed, "last_hidden_state", ir.DataType.FLOAT, ["batch_size", of.positions, of.hidden])
    return ir.to_proto(nodes.model("WhisperEncoder"))


def _convolve(nodes: Nodes, checkpoint: Checkpoint, name: str, value: ir.Value, stride: int) -> ir.Value:
    """A convolution of width 3 over time, and its activation."""
    module = f"{_SCOPE}.{name}"
    operands = [
        nodes.constant(f"{module}.{part}", checkpoint.stored(f"{module}.{part}").float().numpy())
        for part in ("weight", "bias")
    ]
    found = nodes.op("Conv", module, [value, *operands], kernel_shape=[3], pads=[1, 1], strides=[stride])
    return nodes.op("Gelu", module, [found])
