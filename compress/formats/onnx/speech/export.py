"""From a checkpoint's folder to an ONNX model of two graphs with its companion files."""

from __future__ import annotations

import json

from compress.checkpoints.checkpoint import Checkpoint
from compress.checkpoints.checks import INDEX
from compress.checkpoints.torch_model import compact
from compress.formats.onnx.model import DECODER, ENCODER, OnnxModel
from compress.formats.onnx.speech.architecture import read_architecture
from compress.formats.onnx.speech.decoder import write_decoder
from compress.formats.onnx.speech.encoder import write_encoder

_KEPT = ("*.json", "*.txt")
_LEFT_OUT = (INDEX, "config.json")


def export_whisper(checkpoint: Checkpoint, accuracy_level: int = 4) -> OnnxModel:
    """Encoder and decoder of a checkpoint, proven by nothing yet: `prove_whisper` does that.

    Raises `ModelError` for an architecture or a weight that cannot be written.
    """
    of = read_architecture(checkpoint)
    encoder, decoder = (write(checkpoint, of, accuracy_level) for write in (write_encoder, write_decoder))
    names = [f"{part}.onnx" for part in (ENCODER, DECODER)]
    return OnnxModel(encoder, names[0], _companions(checkpoint), {names[1]: decoder})


def _companions(checkpoint: Checkpoint) -> dict[str, bytes]:
    paths = sorted(path for pattern in _KEPT for path in checkpoint.folder.glob(pattern) if path.name not in _LEFT_OUT)
    config = {**checkpoint.config, "dtype": "float32"}
    files = {path.name: compact(path) for path in paths}
    return {**files, "config.json": json.dumps(config, ensure_ascii=False, separators=(",", ":")).encode()}
