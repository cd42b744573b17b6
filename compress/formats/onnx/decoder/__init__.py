"""Decoders as ONNX graphs, written from a checkpoint tensor by tensor for ONNX Runtime's own kernels."""

from __future__ import annotations

from compress.formats.onnx.decoder.architecture import SUPPORTED, DecoderArchitecture, read_architecture
from compress.formats.onnx.decoder.folder import export_decoder
from compress.formats.onnx.decoder.graph import GraphSettings
from compress.formats.onnx.decoder.parity import Equality, prove_decoder

__all__ = [
    "SUPPORTED",
    "DecoderArchitecture",
    "Equality",
    "GraphSettings",
    "export_decoder",
    "prove_decoder",
    "read_architecture",
]
