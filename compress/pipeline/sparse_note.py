"""What a report says of files with many zeros: how many, and that the runtime multiplies them all the same."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from compress.formats.onnx.model import OnnxModel
from compress.measurement import Measurement
from compress.recipe.recipe import Recipe
from compress.targets import Target

if TYPE_CHECKING:
    import onnx

_NOTABLE = 0.05
_SAME = 0.02
"""Within so much of the baseline's speed a file counts as no faster."""


def sparse_notes(
    recipe: Recipe, artifacts: Mapping[str, Path], rows: Sequence[Measurement], target: Target
) -> list[str]:
    """A line for each stage's float file of which a share of the weights is zero, with its measured speed.

    No runtime that `compress` knows has a kernel that skips zeros. Files are looked at only where a stage makes zeros.
    """
    if target.format != OnnxModel.kind or not any(stage.zeros_weights() for stage in recipe.stages):
        return []
    speeds = {row.model: row for row in rows if row.metric == "speedup"}
    lines = []
    for label in recipe.labels():
        if label not in artifacts or label == recipe.baseline:
            continue
        share = zero_share(OnnxModel.load(artifacts[label], recipe.task).graphs.values())
        if share >= _NOTABLE:
            words = f"{share:.0%} of the weights of {label} are zeros, which no kernel of {target.runtime} skips"
            lines.append(f"{target.name}: {words}{_speed(speeds.get(label))}")
    return lines


def zero_share(graphs: Iterable[onnx.ModelProto]) -> float:
    """The share of zeros among all float weights of two axes or more; 0 where there are none."""
    import numpy as np
    from onnx import numpy_helper

    zeros = of = 0
    for graph in graphs:
        for tensor in graph.graph.initializer:
            if len(tensor.dims) > 1:
                array = numpy_helper.to_array(tensor)
                if array.dtype.kind == "f":
                    zeros, of = zeros + int(array.size - np.count_nonzero(array)), of + array.size
    return zeros / of if of else 0.0


def _speed(row: Measurement | None) -> str:
    if row is None:
        return ""
    interval = "" if row.low is None or row.high is None else f", {row.low:.2f} to {row.high:.2f}"
    words = f"; it is {row.value:.2f} times as fast as the baseline{interval}"
    inside = row.low is not None and row.high is not None and row.low <= 1 <= row.high
    return f"{words}: they gain nothing" if inside or abs(row.value - 1) <= _SAME else words
