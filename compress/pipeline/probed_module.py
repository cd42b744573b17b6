"""Looking into a torch module."""

from __future__ import annotations

import numpy as np

from compress.checkpoints.torch_model import TorchModel
from compress.formats.probed import Encode, Probing, Stored, of_arrays


def stored(model: TorchModel) -> Stored:
    """Every weight."""
    return of_arrays((name, tensor.numpy()) for name, tensor in model.tensors().items())


def logits(model: TorchModel, encode: Encode) -> np.ndarray:
    """What the module itself answers."""
    from compress.tasks.forward import predict

    return predict(model.module, encode(model.processor))


PROBED = Probing(stored, logits)
