"""What a GGUF file gives back, held against the checkpoint that it was written from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from compress.formats.gguf.export import AS_IT_IS, PlannedTensor, Types, plan_gguf
from compress.formats.gguf.k_blocks import K_TYPES
from compress.models.checkpoint import Checkpoint

_ROUNDING = 1.001 * 2.0**-11
"""Half a unit in the last place of float16, as a share of the value, and a little for float32's own."""
_ALLOWED = {"F16": _ROUNDING, "Q4_1": _ROUNDING, "Q5_1": _ROUNDING}


_UNRELATED = 0.5 * 2.0**0.5
"""Half of the error, relative, that rows in another order would have; two bits round by a third."""
_SCALES = {"Q2_K": 0.15, "Q3_K": 0.05}
"""What rounding the scales of integers to 4 or 6 bits may come to, in the same measure."""


@dataclass(frozen=True)
class Difference:
    """The ``largest`` difference of a weight of the tensor ``name``, relative to the largest number stored for it.

    Of what the file ``rounded``, floats to few bits or scales, the root of the mean square, relative to that of the
    weights. ``allowed`` is what the type makes of them: minima and plain weights have float16, integers stay.
    """

    name: str
    kind: str
    largest: float
    allowed: float
    rounded: bool = False


def compare_gguf(file: Path, checkpoint: Checkpoint, types: Types = AS_IT_IS) -> list[Difference]:
    """Read every tensor of ``file`` with the `gguf` package, llama.cpp's own, and hold it against the checkpoint."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    stored = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    found = []
    for planned in plan_gguf(checkpoint, types):
        tensor, kind = stored[planned.name], planned.kind
        given = dequantize(tensor.data, tensor.tensor_type).reshape(planned.shape)
        wanted, magnitude = _expected(checkpoint, planned)
        floats = types.file_type is not None and kind not in ("F16", "F32")
        if floats or kind in K_TYPES:
            allowed = _UNRELATED if floats else _SCALES[kind]
            error, size = (float(np.linalg.norm(values)) for values in (given - wanted, wanted))
            found.append(Difference(planned.name, kind, error / (size or 1.0), allowed, rounded=True))
            continue
        largest = float(np.abs(given - wanted).max()) / (magnitude or 1.0)
        found.append(Difference(planned.name, kind, largest, _ALLOWED.get(kind, 0.0)))
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
