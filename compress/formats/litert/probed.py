"""Looking into a LiteRT file."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from compress.checkpoints.processor import processor_of
from compress.formats.litert.model import LITERT_FILE, LiteRtModel
from compress.formats.litert.read import read_litert
from compress.formats.probed import Encode, Probing, Stored, answers_of


def stored(model: LiteRtModel) -> Stored:
    """Every stored tensor, scales among them."""
    return ((one, one.data(model.graph)) for one in read_litert(model.graph, Path(LITERT_FILE)).tensors)


def logits(model: LiteRtModel, encode: Encode) -> np.ndarray:
    """What LiteRT answers."""
    from compress.formats.litert.runtime import open_bytes

    return answers_of(open_bytes(model, threads=1), encode(processor_of(model)))


PROBED = Probing(stored, logits, "litert")
