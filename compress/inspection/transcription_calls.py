"""Inputs of a generative model's graphs during generation or transcription, including the decoder's."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from compress.formats.generation.image_text import open_together
from compress.formats.onnx.int8.observers import Feed
from compress.formats.onnx.model import find_graphs
from compress.formats.runtime import Batch, Session, get_runtime
from compress.formats.targets import TARGETS


class _Recorder:
    """Session wrapper that records its inputs."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.calls: list[Feed] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def predict(self, batch: Batch) -> dict[str, np.ndarray]:
        self.calls.append(dict(batch))
        return self._session.predict(batch)


def transcription_calls(folder: Path, examples: Iterable[Batch], most: int) -> list[list[Feed]]:
    """Return the inputs of each graph of the model in ``folder`` in its first ``most`` calls per example.

    An example is a batch of one. An encoder runs once per window, text or image; the decoder reads the prompt first,
    and then one token per call. Raises the errors of opening and running the model.
    """
    runtime, cpu = get_runtime("onnxruntime"), TARGETS["cpu"]
    # Wrap every graph's session, then run the model through the wrappers.
    recorders: list[Any] = [_Recorder(runtime.open(path, cpu, 1)) for path in find_graphs(folder)]
    model = open_together(recorders, folder)
    recorded: list[list[Feed]] = [[] for _ in recorders]
    for example in examples:
        model.predict(example)
        for recorder, calls in zip(recorders, recorded, strict=True):
            calls += recorder.calls[:most]
            recorder.calls.clear()
    return recorded
