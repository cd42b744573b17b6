"""What both graphs of a speech model are asked while they transcribe: real inputs, for the decoder as well."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from compress.formats.onnx.int8.observe import Feed
from compress.formats.onnx.model import find_graphs
from compress.formats.runtimes import get_runtime
from compress.formats.targets import TARGETS
from compress.runtimes.runtime import Batch, Session
from compress.runtimes.transcriber import Transcriber


class _Recorder:
    """A session that keeps what it is asked."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.calls: list[Feed] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def predict(self, batch: Batch) -> dict[str, np.ndarray]:
        self.calls.append(dict(batch))
        return self._session.predict(batch)


def transcription_calls(folder: Path, recordings: Iterable[Batch], most: int) -> tuple[list[Feed], list[Feed]]:
    """What encoder and decoder of the model in ``folder`` are asked, in their first ``most`` calls for each recording.

    A recording is a batch of one. The encoder is asked once for each window; the decoder reads the prompt first, and
    then a token a call. Raises what `Transcriber` does.
    """
    runtime, cpu = get_runtime("onnxruntime"), TARGETS["cpu"]
    recorders: list[Any] = [_Recorder(runtime.open(path, cpu, 1)) for path in find_graphs(folder)]
    encoder, decoder = recorders
    transcriber = Transcriber(encoder, decoder, folder)
    found: tuple[list[Feed], list[Feed]] = ([], [])
    for recording in recordings:
        transcriber.predict(recording)
        for recorder, kept in zip(recorders, found, strict=True):
            kept += recorder.calls[:most]
            recorder.calls.clear()
    return found
