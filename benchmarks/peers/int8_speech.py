"""What other people's quantizers need of Whisper: the exporter's encoder, and what a decoder is asked."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from compress.models.int8.observe import Feed
from compress.models.onnx_export import export_onnx
from compress.models.onnx_model import OnnxModel, find_graphs
from compress.models.torch_model import TorchModel
from compress.runtimes import get_runtime
from compress.runtimes.runtime import Batch, Session
from compress.runtimes.transcriber import Transcriber
from compress.targets import TARGETS
from compress.tasks.task import Examples

_CALLS = 6
"""Of a recording: the prompt and the first tokens."""


def plain_encoder(model: TorchModel, feed: Feed) -> onnx.ModelProto:
    """The encoder as the exporter writes it; its decoder comes in two files, whose caches have other names."""
    encoder = replace(model, module=model.module.get_encoder())
    inputs = [{name: array[0] for name, array in feed.items()}] * 2
    return export_onnx(encoder, Examples(inputs, dict.fromkeys(feed), None), None, fusions=False).graph


def decoder_calls(model: OnnxModel, windows: Sequence[np.ndarray]) -> list[Feed]:
    """Every input of the decoder, in its first calls for each of ``windows`` [features, frames]."""
    with tempfile.TemporaryDirectory() as name:
        model.save(Path(name))
        encoder, decoder = (
            get_runtime("onnxruntime").open(path, TARGETS["cpu"], 2) for path in find_graphs(Path(name))
        )
        found: list[Feed] = []
        for window in windows:
            recorder = _Recorder(decoder)
            Transcriber(encoder, recorder, Path(name)).tokens(window)
            found += recorder.calls[:_CALLS]
    return found


class _Recorder:
    """A session that keeps what it is asked."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.calls: list[Feed] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def predict(self, batch: Batch) -> dict[str, np.ndarray]:
        """As the session does."""
        self.calls.append(dict(batch))
        return self._session.predict(batch)
