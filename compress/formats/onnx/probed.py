"""Looking into an ONNX model of one graph or several."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from compress.formats.onnx.arrays import ProbedArrays
from compress.formats.onnx.model import OnnxModel, processor_of
from compress.formats.probed import Encode
from compress.tasks.task import Examples


@dataclass(frozen=True)
class ProbedGraph(ProbedArrays):
    """See `Probed`."""

    model: OnnxModel

    def logits(self, encode: Encode) -> np.ndarray:
        """What ONNX Runtime answers."""
        if self.model.others:
            from compress.formats.onnx.probed_speech import speech_logits

            return speech_logits(self.model, encode)
        return run_graph(self.model.graph.SerializeToString(), encode(processor_of(self.model)))

    def stored(self) -> Iterator[tuple[str, np.ndarray]]:
        """Those of every graph."""
        from onnx import numpy_helper

        for graph in self.model.graphs.values():
            for tensor in graph.graph.initializer:
                yield tensor.name, numpy_helper.to_array(tensor)


def run_graph(graph: bytes, examples: Examples) -> np.ndarray:
    """What ONNX Runtime answers with the graph of a file, in its own format or ONNX."""
    import onnxruntime

    from compress.formats.onnx.runtimes.onnxruntime import OnnxSession
    from compress.runtimes.decoder import feeder

    name = "CPUExecutionProvider"
    session = OnnxSession(onnxruntime.InferenceSession(graph, providers=[name]), Path("the stage's graph"), name, 0)
    feed = feeder(session, "the stage's graph")
    batch = examples.batch(range(len(examples)))
    return examples.answers(session.predict(feed(batch)), batch)


PROBED = ProbedGraph
