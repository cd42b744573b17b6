"""Export of decoders and encoder-decoders: modules are traced without weights, which are inserted later."""

from __future__ import annotations

from compress.formats.onnx.decoder.export import (
    export_decoder,
    export_encoder_decoder,
    export_image_reader,
    export_verified_decoder,
)
from compress.formats.onnx.decoder.parity import (
    DecoderParity,
    open_image_reader,
    teacher_forced_logits,
    verify_decoder,
    verify_encoder_decoder,
    verify_image_reader,
)
from compress.formats.onnx.decoder.weights import GraphSettings

__all__ = [
    "DecoderParity",
    "GraphSettings",
    "export_decoder",
    "export_encoder_decoder",
    "export_image_reader",
    "export_verified_decoder",
    "open_image_reader",
    "teacher_forced_logits",
    "verify_decoder",
    "verify_encoder_decoder",
    "verify_image_reader",
]
