"""Decoders, and encoders with decoders, as ONNX graphs: transformers' own modules traced once, weights put in later."""

from __future__ import annotations

from compress.formats.onnx.decoder.fill import GraphSettings
from compress.formats.onnx.decoder.folder import export_decoder, export_encoder_decoder, export_proven
from compress.formats.onnx.decoder.image_reader import export_image_reader, opened_reader, prove_image_reader
from compress.formats.onnx.decoder.pair_parity import prove_encoder_decoder, teacher_forced
from compress.formats.onnx.decoder.parity import Equality, prove_decoder

__all__ = [
    "Equality",
    "GraphSettings",
    "export_decoder",
    "export_encoder_decoder",
    "export_image_reader",
    "export_proven",
    "opened_reader",
    "prove_decoder",
    "prove_encoder_decoder",
    "prove_image_reader",
    "teacher_forced",
]
