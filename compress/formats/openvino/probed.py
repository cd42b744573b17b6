"""Looking into OpenVINO's IR."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from compress.checkpoints.processor import processor_of
from compress.formats.openvino.model import IR_FILE, OpenVinoModel
from compress.formats.openvino.read import read_ir
from compress.formats.probed import Encode, Probing, Stored, answers_of


def stored(model: OpenVinoModel) -> Stored:
    """Every constant."""
    constants = read_ir(model.graph, Path(IR_FILE), len(model.weights))
    return ((one, one.data(model.weights)) for one in constants)


def logits(model: OpenVinoModel, encode: Encode) -> np.ndarray:
    """What OpenVINO answers."""
    from compress.formats.openvino.runtime import open_bytes

    return answers_of(open_bytes(model, threads=1), encode(processor_of(model)))


PROBED = Probing(stored, logits, "openvino")
