"""The training examples that activation ranges are found on: how many, which, and a record of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, overload

import numpy as np

from compress.errors import DataError
from compress.models.int8.observe import Feed
from compress.models.onnx_model import OnnxModel, labels_of, processor_of
from compress.numerics.sampling import spread_sample

if TYPE_CHECKING:
    import onnx

    from compress.stages.stage import Context
    from compress.tasks.task import Examples

_SPLIT = "train"
METADATA = "compress.calibration"
"""The key of the record among a graph's metadata."""


class OneByOne(Sequence[Feed]):
    """Examples as batches of one, made when they are asked for."""

    def __init__(self, examples: Examples, rows: np.ndarray) -> None:
        self._examples, self._rows = examples, rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, place: int) -> Feed: ...

    @overload
    def __getitem__(self, place: slice) -> Sequence[Feed]: ...

    def __getitem__(self, place: int | slice) -> Feed | Sequence[Feed]:
        if isinstance(place, slice):
            return OneByOne(self._examples, self._rows[place])
        return self._examples.batch([int(self._rows[place])])


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
    return CalibrationSet(OneByOne(examples, chosen), chosen, kinds, context.seed)
