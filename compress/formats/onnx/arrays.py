"""Looking into a model whose stored tensors can all be had as arrays."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator

import numpy as np

from compress.formats.probed import digest_array


class ProbedArrays(ABC):
    """What `Probed` asks of weights, of arrays; each kind says where they are and what it answers."""

    @abstractmethod
    def stored(self) -> Iterator[tuple[str, np.ndarray]]:
        """Every stored tensor with its name."""

    def float_arrays(self) -> Iterable[tuple[str, np.ndarray]]:
        """Every floating-point tensor that is stored."""
        return ((name, array) for name, array in self.stored() if array.dtype.kind == "f")

    def digests(self) -> dict[str, str]:
        """Of every stored tensor; names are those of the weights' modules, and so of one graph alone."""
        return {name: digest_array(array) for name, array in self.stored()}

    def unavailable_reason(self) -> str | None:
        """It answers everywhere."""
        return None
