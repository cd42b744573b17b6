"""Looking into a torch module."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from compress.checkpoints.torch_model import TorchModel
from compress.formats.probed import Encode, digest_array


@dataclass(frozen=True)
class ProbedModule:
    """See `Probed`."""

    model: TorchModel

    def float_arrays(self) -> Iterable[tuple[str, np.ndarray]]:
        """Every floating-point weight, as float32."""
        tensors = self.model.tensors().items()
        return [(name, tensor.float().numpy()) for name, tensor in tensors if tensor.is_floating_point()]

    def digests(self) -> dict[str, str]:
        """Of every weight."""
        return {name: digest_array(tensor.numpy()) for name, tensor in self.model.tensors().items()}

    def unavailable_reason(self) -> None:
        """It answers everywhere."""

    def logits(self, encode: Encode) -> np.ndarray:
        """What the module itself answers."""
        from compress.tasks.forward import predict

        return predict(self.model.module, encode(self.model.processor))
