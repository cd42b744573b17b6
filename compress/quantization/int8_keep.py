"""Layers that a recipe leaves in float by name."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

import onnx

from compress.errors import StageError
from compress.formats.onnx.int8.choose import QuantizableLayer
from compress.quantization.int8_floor import Quantizer


class Keeping:
    """A quantizer that leaves the layers of ``names`` in float, whatever else is asked for."""

    def __init__(self, quantizer: Quantizer, names: Collection[str]) -> None:
        self._quantizer, self._names = quantizer, tuple(names)
        self.layers: list[QuantizableLayer] = [layer for layer in quantizer.layers if layer.name not in self._names]

    def quantize(self, kept: Collection[str] = ()) -> onnx.ModelProto:
        """See `Quantizer.quantize`."""
        return self._quantizer.quantize([*self._names, *kept])


def kept_layers(layers: Sequence[QuantizableLayer], patterns: Sequence[str]) -> list[str]:
    """Names of the layers whose own name or whose weight's fits one of ``patterns``.

    Raises `StageError` for a pattern that fits none, and where no layer is left.
    """
    found: set[str] = set()
    for pattern in patterns:
        fitting = {each.name for each in layers if fnmatchcase(each.name, pattern) or fnmatchcase(each.weight, pattern)}
        if not fitting:
            weights = [layer.weight for layer in layers]
            near = get_close_matches(pattern, weights, n=3, cutoff=0) or weights[:3]
            raise StageError(
                f"No layer's name or weight fits {pattern!r}.",
                where="quantize, keep",
                expected=f"patterns such as {', '.join(map(repr, near))}",
                mend="`compress inspect` on the export shows the weights' names",
            )
        found |= fitting
    if len(found) == len(layers):
        raise StageError(
            "Every layer is to be kept in float.", where="quantize, keep", expected="some left to quantize"
        )
    return [layer.name for layer in layers if layer.name in found]
