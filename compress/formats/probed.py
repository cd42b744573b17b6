"""What the integrity check asks of a model, whatever its kind."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from compress.tasks.task import Examples

Encode = Callable[[Any], "Examples"]
"""From a processor to the probes as it encodes them."""

WINDOWS = 4
TOKENS = 64
POSITIONS = 8
"""Running text is probed at the last positions of the beginnings of a few windows."""


class Probed(Protocol):
    """A model that can be looked into."""

    def float_arrays(self) -> Iterable[tuple[str, np.ndarray]]:
        """Every floating-point weight with its name; a large one may come in pieces."""

    def digests(self) -> dict[str, str]:
        """SHA-256 of each weight's shape and bytes, by name."""

    def unavailable_reason(self) -> str | None:
        """Why it cannot answer here, or ``None``: its runtime may be an optional package."""

    def logits(self, encode: Encode) -> np.ndarray:
        """What it answers to the probes, [n, ...]."""


def digest_array(array: np.ndarray) -> str:
    """SHA-256 of an array's shape and bytes, as hex."""
    return hashlib.sha256(str(array.shape).encode() + np.ascontiguousarray(array).tobytes()).hexdigest()
