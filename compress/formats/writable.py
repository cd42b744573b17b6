"""Whether a causal model can be written in a format at all: asked of its folder, before any work is done for it."""

from __future__ import annotations

from pathlib import Path

from compress.checkpoints.checkpoint import Checkpoint
from compress.formats.model_file import Format


def check_writable(folder: Path, form: Format) -> None:
    """Raise `ModelError` for an architecture, or a tokenizer, that the format has no place for."""
    if form == "onnx":
        from compress.formats.onnx.decoder import read_architecture

        read_architecture(Checkpoint(folder))
        return
    from compress.formats.gguf.architecture import GgufArchitecture
    from compress.formats.gguf.tokenizer import check_tokenizer

    GgufArchitecture.of(Checkpoint(folder))
    check_tokenizer(folder)
