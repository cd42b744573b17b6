"""Looking into a graph in ONNX Runtime's own format."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from compress.checkpoints.processor import processor_of
from compress.formats.onnx.probed import run_graph
from compress.formats.ort.model import ORT_FILE, OrtModel
from compress.formats.ort.read import read_ort
from compress.formats.probed import Encode, Probing, Stored


def stored(model: OrtModel) -> Stored:
    """Every tensor of the file."""
    return ((one, one.data(model.graph)) for one in read_ort(model.graph, Path(ORT_FILE)).tensors)


def logits(model: OrtModel, encode: Encode) -> np.ndarray:
    """What ONNX Runtime answers."""
    return run_graph(model.graph, encode(processor_of(model)))


PROBED = Probing(stored, logits)
