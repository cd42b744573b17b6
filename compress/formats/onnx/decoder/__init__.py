"""Decoders, and encoders with decoders, as ONNX graphs: transformers' own modules traced once, weights put in later."""

from __future__ import annotations

from compress.formats.onnx.decoder.export import (
    export_decoder,
    export_encoder_decoder,
    export_image_reader,
    export_proven,
)
from compress.formats.onnx.decoder.parity import (
    Equality,
    opened_reader,
    prove_decoder,
    prove_encoder_decoder,
    prove_image_reader,
    teacher_forced,
)
from compress.formats.onnx.decoder.weights import GraphSettings

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
