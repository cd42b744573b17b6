"""What the graphs of a model are asked while they write or transcribe: real inputs, for the decoder as well."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from compress.formats.onnx.int8.observers import Feed
from compress.formats.onnx.model import find_graphs
from compress.formats.runtimes import get_runtime
from compress.formats.targets import TARGETS
from compress.runtimes.image_answers import open_together
from compress.runtimes.runtime import Batch, Session


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


def transcription_calls(folder: Path, examples: Iterable[Batch], most: int) -> list[list[Feed]]:
    """What each graph of the model in ``folder`` is asked, in its first ``most`` calls for each example.

    An example is a batch of one. An encoder is asked once for each window, text or image; the decoder reads the prompt
    first, and then a token a call. Raises what opening and running the model raise.
    """
    runtime, cpu = get_runtime("onnxruntime"), TARGETS["cpu"]
    recorders: list[Any] = [_Recorder(runtime.open(path, cpu, 1)) for path in find_graphs(folder)]
    whole = open_together(recorders, folder)
    found: list[list[Feed]] = [[] for _ in recorders]
    for example in examples:
        whole.predict(example)
        for recorder, kept in zip(recorders, found, strict=True):
            kept += recorder.calls[:most]
            recorder.calls.clear()
    return found
