"""Looking into an ExecuTorch program."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from compress.checkpoints.processor import processor_of
from compress.formats.executorch.model import PTE_FILE, ExecuTorchModel
from compress.formats.executorch.read import read_pte
from compress.formats.probed import Encode, Probing, Stored, answers_of


def stored(model: ExecuTorchModel) -> Stored:
    """Every constant."""
    return ((one, one.data(model.program)) for one in read_pte(model.program, Path(PTE_FILE)))


def logits(model: ExecuTorchModel, encode: Encode) -> np.ndarray:
    """What ExecuTorch answers."""
    from compress.formats.executorch.runtime import open_bytes

    return answers_of(open_bytes(model, threads=1), encode(processor_of(model)))


PROBED = Probing(stored, logits, "executorch")
