"""Inputs for other quantizers of Whisper: the plain exported encoder, and calibration calls of the decoder."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import onnx

from compress.formats.onnx.export import export_onnx
from compress.formats.onnx.int8.observers import Feed
from compress.formats.onnx.model import OnnxModel
from compress.inspection.activation_clipping import transcription_calls
from compress.models.model import TorchModel
from compress.tasks.task import Examples

_CALLS = 6
"""Decoder calls per recording: the prompt and the first tokens."""


def plain_encoder(model: TorchModel, feed: Feed) -> onnx.ModelProto:
    """Return the encoder as torch exports it, without this project's fusions."""
    encoder = replace(model, module=model.module.get_encoder())
    inputs = [{name: array[0] for name, array in feed.items()}] * 2
    return export_onnx(encoder, Examples(inputs, dict.fromkeys(feed), None), None, fusions=False).graph


def decoder_calls(model: OnnxModel, recordings: Sequence[Feed]) -> list[Feed]:
    """Return the inputs of the decoder in its first calls for each recording."""
    with tempfile.TemporaryDirectory() as name:
        model.save(Path(name))
        return transcription_calls(Path(name), recordings, _CALLS)[1]
