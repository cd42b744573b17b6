"""Decoders, and encoders with decoders, as ONNX graphs: transformers' own modules traced once, weights put in later."""

from __future__ import annotations

from compress.formats.onnx.decoder.fill import GraphSettings
from compress.formats.onnx.decoder.folder import export_decoder, export_encoder_decoder, export_proven
from compress.formats.onnx.decoder.pair_parity import prove_encoder_decoder, teacher_forced
from compress.formats.onnx.decoder.parity import Equality, prove_decoder

__all__ = [
    "Equality",
    "GraphSettings",
    "export_decoder",
    "export_encoder_decoder",
    "export_proven",
    "prove_decoder",
    "prove_encoder_decoder",
    "teacher_forced",
]
