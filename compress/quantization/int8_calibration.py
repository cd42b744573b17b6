"""The training examples that activation ranges are found on: how many, which, and a record of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from compress.checkpoints.processor import labels_of, processor_of
from compress.errors import DataError
from compress.formats.onnx.int8.observe import Feed
from compress.formats.onnx.model import OnnxModel
from compress.numerics.sampling import spread_sample

if TYPE_CHECKING:
    import onnx

    from compress.stage.stage import Context
    from compress.tasks.task import Examples

_SPLIT = "train"
METADATA = "compress.calibration"
"""The key of the record among a graph's metadata."""


class OneByOne(Sequence[Feed]):
    """Examples as batches of one, made when they are asked for.

    ``lengths`` are those of the last axes that a graph fixes: of a longer recording its first window is taken.
    """

    def __init__(self, examples: Examples, rows: np.ndarray, lengths: Mapping[str, int] | None = None) -> None:
        self._examples, self._rows, self._lengths = examples, rows, lengths or {}

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place: int) -> Feed:  # type: ignore[override]
        feed = self._examples.batch([int(self._rows[place])])
        return {name: array[..., : self._lengths.get(name)] for name, array in feed.items()}


@dataclass(frozen=True)
class CalibrationSet:
    """One feed for each example, so that nothing is padded; ``rows`` are their places in the split."""

    feeds: Sequence[Feed]
    rows: np.ndarray
    labels: int
    seed: int

    def __str__(self) -> str:
        kinds = f" of {self.labels} labels" if self.labels else ""
        return f"{len(self.feeds)} examples{kinds}, all lengths, seed {self.seed}"

    def record(self, graph: onnx.ModelProto) -> None:
        """Write into ``graph``, in place, what it was calibrated on."""
        digest = hashlib.sha256(self.rows.astype("<i8").tobytes()).hexdigest()
        facts = {"split": _SPLIT, "examples": len(self.rows), "labels": self.labels, "seed": self.seed}
        graph.metadata_props.add(key=METADATA, value=json.dumps({**facts, "rows_sha256": digest}, sort_keys=True))


def calibration_set(model: OnnxModel, context: Context, count: int) -> CalibrationSet:
    """``count`` training examples (or all) of all labels and lengths alike. Raises `DataError` for an empty split."""
    rows = context.data.split(_SPLIT)
    if len(rows) == 0:
        raise DataError("The train split is empty, so there is nothing to calibrate with.", where=f"split {_SPLIT}")
    examples = context.task.encode(rows, processor_of(model), labels_of(model), context.max_length)
    classes = examples.classes
    chosen = spread_sample(examples.lengths(), classes, count, context.seed)
    kinds = 0 if classes is None else len(np.unique(classes[chosen]))
    return CalibrationSet(OneByOne(examples, chosen, _fixed_lengths(model.graph)), chosen, kinds, context.seed)


def _fixed_lengths(graph: onnx.ModelProto) -> dict[str, int]:
    """The last axis of each input that says how long it is."""
    shapes = {value.name: value.type.tensor_type.shape.dim for value in graph.graph.input}
    return {name: axes[-1].dim_value for name, axes in shapes.items() if len(axes) > 1 and axes[-1].dim_value}
