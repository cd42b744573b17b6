"""Looking into a graph in ONNX Runtime's own format."""

from __future__ import annotations

import tempfile
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
        from compress.models.ort_file import load_ort_tensor, read_ort

        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / ORT_FILE
            file.write_bytes(self.model.graph)
            for tensor in read_ort(file).tensors:
                yield tensor.name, load_ort_tensor(file, tensor)


PROBED = ProbedOrt
