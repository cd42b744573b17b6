"""Decoders as ONNX graphs: transformers' own modules traced once, and a checkpoint's weights put in one by one."""

from __future__ import annotations

from compress.formats.onnx.decoder.fill import GraphSettings
from compress.formats.onnx.decoder.folder import export_decoder, export_proven
from compress.formats.onnx.decoder.parity import Equality, prove_decoder

__all__ = ["Equality", "GraphSettings", "export_decoder", "export_proven", "prove_decoder"]
