"""Looking into a graph in ONNX Runtime's own format."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from compress.models.onnx_model import processor_of
from compress.models.ort_model import ORT_FILE, OrtModel
from compress.pipeline.probed import Encode, digest_array
from compress.pipeline.probed.graph import run_graph


@dataclass(frozen=True)
class ProbedOrt:
    """See `Probed`."""

    model: OrtModel

    def float_arrays(self) -> Iterable[tuple[str, np.ndarray]]:
        """Every floating-point tensor that is stored."""
        return ((name, array) for name, array in self._stored() if array.dtype.kind == "f")

    def digests(self) -> dict[str, str]:
        """Of every stored tensor."""
        return {name: digest_array(array) for name, array in self._stored()}

    def why_silent(self) -> None:
        """It answers everywhere."""

    def logits(self, encode: Encode) -> np.ndarray:
        """What ONNX Runtime answers."""
        return run_graph(self.model.graph, encode(processor_of(self.model)))

    def _stored(self) -> Iterator[tuple[str, np.ndarray]]:
        from compress.models.ort_file import load_ort_tensor, read_ort

        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / ORT_FILE
            file.write_bytes(self.model.graph)
            for tensor in read_ort(file).tensors:
                yield tensor.name, load_ort_tensor(file, tensor)


PROBED = ProbedOrt
