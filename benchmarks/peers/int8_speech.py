"""What other people's quantizers need of Whisper: the exporter's encoder, and what a decoder is asked."""

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
"""Of a recording: the prompt and the first tokens."""


def plain_encoder(model: TorchModel, feed: Feed) -> onnx.ModelProto:
    """The encoder as the exporter writes it; its decoder comes in two files, whose caches have other names."""
    encoder = replace(model, module=model.module.get_encoder())
    inputs = [{name: array[0] for name, array in feed.items()}] * 2
    return export_onnx(encoder, Examples(inputs, dict.fromkeys(feed), None), None, fusions=False).graph


def decoder_calls(model: OnnxModel, recordings: Sequence[Feed]) -> list[Feed]:
    """Every input of the decoder, in its first calls for each of ``recordings``."""
    with tempfile.TemporaryDirectory() as name:
        model.save(Path(name))
        return transcription_calls(Path(name), recordings, _CALLS)[1]
