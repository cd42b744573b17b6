"""Looking into a graph in ONNX Runtime's own format."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from compress.models.onnx_model import processor_of
from compress.models.ort_model import ORT_FILE, OrtModel
from compress.pipeline.probed import Encode
from compress.pipeline.probed.arrays import ProbedArrays
from compress.pipeline.probed.graph import run_graph


@dataclass(frozen=True)
class ProbedOrt(ProbedArrays):
    """See `Probed`."""

    model: OrtModel

    def logits(self, encode: Encode) -> np.ndarray:
        """What ONNX Runtime answers."""
        return run_graph(self.model.graph, encode(processor_of(self.model)))

    def stored(self) -> Iterator[tuple[str, np.ndarray]]:
        """Those of the file."""
        from compress.models.ort_file import read_ort

        for tensor in read_ort(self.model.graph, Path(ORT_FILE)).tensors:
            yield tensor.name, tensor.values(self.model.graph)


PROBED = ProbedOrt
