"""What a GGUF file gives back, held against the checkpoint that it was written from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from compress.checkpoints.checkpoint import Checkpoint
from compress.formats.gguf.export import FloatType, PlannedTensor, plan_gguf

_ROUNDING = 1.001 * 2.0**-11
"""Half a unit in the last place of float16, as a share of the value, and a little for float32's own."""
_ALLOWED = {"F16": _ROUNDING, "Q4_1": _ROUNDING, "Q5_1": _ROUNDING}


_UNRELATED = 0.5 * 2.0**0.5
"""Half of the error, relative, that rows in another order would have; two bits round by a third."""


@dataclass(frozen=True)
class Difference:
    """The ``largest`` difference of a weight of the tensor ``name``, relative to the largest number stored for it.

    Of floats that were rounded to few bits, the root of the mean square, relative to that of the weights.
    """

    name: str
    kind: str
    largest: float
    rounded: bool = False

    @property
    def allowed(self) -> float:
        """What the type rounds: minima and plain weights to float16, integers not at all."""
        return _UNRELATED if self.rounded else _ALLOWED.get(self.kind, 0.0)


def compare_gguf(
    file: Path, checkpoint: Checkpoint, float_type: FloatType = "f16", file_type: str | None = None
) -> list[Difference]:
    """Read every tensor of ``file`` with the `gguf` package, llama.cpp's own, and hold it against the checkpoint."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    stored = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    found = []
    for planned in plan_gguf(checkpoint, float_type, file_type):
        tensor = stored[planned.name]
        given = dequantize(tensor.data, tensor.tensor_type).reshape(planned.shape)
        wanted, magnitude = _expected(checkpoint, planned)
        rounded = file_type is not None and planned.kind not in ("F16", "F32")
        if rounded:
            difference, magnitude = (float(np.linalg.norm(values)) for values in (given - wanted, wanted))
        else:
            difference = float(np.abs(given - wanted).max())
        found.append(Difference(planned.name, planned.kind, difference / (magnitude or 1.0), rounded))
    return found


def _expected(checkpoint: Checkpoint, planned: PlannedTensor) -> tuple[np.ndarray, float]:
    """The weights in the file's order of rows, and the largest of them or of the minima that they are stored with."""
    if planned.parts:
        found = [_expected(checkpoint, part) for part in planned.parts]
        return np.stack([values for values, _ in found]), max(magnitude for _, magnitude in found)
    if planned.source is None:
        values = planned.data()
        return values, float(np.abs(values).max())
    module, _, part = planned.source.rpartition(".")
    quantized = checkpoint.quantized(module) if part == "weight" else None
    if quantized is None:
        stored = checkpoint.stored(planned.source).float()
        array: np.ndarray = (stored if planned.values is None else planned.values(stored)).numpy()
        magnitude = float(np.abs(array).max())
    else:
        array = quantized.dequantize().numpy()
        magnitude = max(float(np.abs(array).max()), float((quantized.zero_points * quantized.scales).max()))
    return (array if planned.order is None else array[planned.order]), magnitude
