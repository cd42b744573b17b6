"""Looking into a graph in ONNX Runtime's own format."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from compress.formats.onnx.arrays import ProbedArrays
from compress.formats.onnx.model import processor_of
from compress.formats.onnx.probed import run_graph
from compress.formats.ort.model import ORT_FILE, OrtModel
from compress.formats.probed import Encode


@dataclass(frozen=True)
class ProbedOrt(ProbedArrays):
    """See `Probed`."""

    model: OrtModel

    def logits(self, encode: Encode) -> np.ndarray:
        """What ONNX Runtime answers."""
        return run_graph(self.model.graph, encode(processor_of(self.model)))

    def stored(self) -> Iterator[tuple[str, np.ndarray]]:
        """Those of the file."""
        from compress.formats.ort.file import read_ort

        for tensor in read_ort(self.model.graph, Path(ORT_FILE)).tensors:
            yield tensor.name, tensor.values(self.model.graph)


PROBED = ProbedOrt
