"""Looking into a Core ML package."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from compress.checkpoints.processor import processor_of
from compress.formats.coreml.model import PACKAGE, CoreMlModel
from compress.formats.coreml.read import read_coreml
from compress.formats.probed import Encode, Probing, Stored, answers_of
from compress.formats.runtimes import get_runtime
from compress.formats.targets import TARGETS


def stored(model: CoreMlModel) -> Stored:
    """Every constant."""
    program = read_coreml(model.specification, model.weights, Path(PACKAGE))
    return ((one, one.data(model.weights)) for one in program.constants)


def logits(model: CoreMlModel, encode: Encode) -> np.ndarray:
    """What Core ML answers."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_package(Path(folder) / PACKAGE)
        session = get_runtime("coreml").open(Path(folder), TARGETS["coreml"], threads=1)
        return answers_of(session, encode(processor_of(model)))


PROBED = Probing(stored, logits, "coreml")
