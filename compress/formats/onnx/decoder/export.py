"""From a checkpoint's folder to an ONNX model with its companion files."""

from __future__ import annotations

from compress.checkpoints.checkpoint import Checkpoint
from compress.formats.onnx.decoder.architecture import read_architecture
from compress.formats.onnx.decoder.folder import companions
from compress.formats.onnx.decoder.graph import GraphSettings, write_graph
from compress.formats.onnx.decoder.stored_weight import INTEGERS
from compress.formats.onnx.model import EXTERNAL_DATA_FROM_BYTES, FLOAT_GRAPH, OnnxModel

FEW_BITS_GRAPH = "model_q4.onnx"
"""What transformers.js opens for `dtype: "q4"`; the bits of each weight are its own."""


def export_decoder(checkpoint: Checkpoint, settings: GraphSettings | None = None) -> OnnxModel:
    """The decoder of a float or quantized checkpoint, proven by nothing yet: `prove_decoder` does that.

    Raises `ModelError` for an architecture or a weight that cannot be written.
    """
    architecture = read_architecture(checkpoint)
    graph = write_graph(checkpoint, architecture, settings or GraphSettings())
    quantized = any(INTEGERS in one.name for one in graph.graph.initializer)
    file_name = FEW_BITS_GRAPH if quantized else FLOAT_GRAPH
    external = graph.ByteSize() > EXTERNAL_DATA_FROM_BYTES
    return OnnxModel(graph, file_name, companions(checkpoint, architecture, file_name, external))
