"""Graph agreement: a graph of any kind, judged by how near its outputs stay to the original's. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from compress.data.arrays import INPUTS, seed_of
from compress.data.columns import Column
from compress.data.media import content, describe
from compress.models.graph_inputs import GraphInputs
from compress.tasks.capability import READS_ROWS, SINGLE_CALL, TAKES_ARRAYS
from compress.tasks.task import CollectedOutputs, Examples, Task
from compress.utils.errors import DataError, ModelError, StageError

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    import torch

    from compress.models.torch_model import TorchModel
    from compress.results.measurement import Measurement

_MOST = 65_536
"""Numbers of an output that are kept of a call; of more, evenly spread ones."""
_CHOICE, _SIZE = "choice of ", "size of "
_NOTE = (
    "only agreement with the original graph was measured, not accuracy: no task says what its outputs should be; "
    "name a task, and put the processor's files beside the graph, to measure that"
)
_DRAWN = "; inputs were drawn at random in the types and shapes that the graph states, and real ones may fare otherwise"


class GraphAgreement(Task):
    """A task of none: arrays go in, batch axis and all, and whatever outputs there are are compared."""

    name = "graph-agreement"
    columns = (Column(INPUTS, kind="arrays"),)
    capabilities = frozenset({READS_ROWS, TAKES_ARRAYS, SINGLE_CALL})
    batch_size = 1
    starter = MappingProxyType(
        {
            "name": "my-graph",
            "description": "an ONNX graph in INT8, compared with itself in float",
            "model": "model.onnx",
            "stages": [{"onnx_int8": {"error_ceiling": 0.05}}],
            "targets": ["cpu"],
            "benchmark": {},
            "limits": [{"metric": "rms_error", "at_most": 0.1}],
        }
    )
    data = MappingProxyType({"splits": {"train": "random:64", "test": "random:128"}})

    def load(self, directory: Path, labels: Sequence[str] | None, trust_remote_code: bool) -> TorchModel:
        """There is none. Raises `ModelError`."""
        raise ModelError(
            "This task is for ONNX graphs.",
            where=str(directory),
            expected="an .onnx file as `model`",
            hint="give a checkpoint's recipe the task that it is for",
        )

    def encode(self, rows: pa.Table, processor: Any, labels: Sequence[str] | None, max_length: int) -> Examples:
        """One call of the graph for each row. Raises `DataError` for arrays that it doesn't take."""
        import numpy as np

        if not isinstance(processor, GraphInputs):
            raise DataError("The model takes no plain arrays.", expected="an ONNX graph", where="task")
        found, drawn = [], 0
        for value in rows[INPUTS].to_pylist():
            encoded = content(value)
            seed = seed_of(encoded)
            drawn += seed is not None
            found.append(processor.read(encoded, describe(value)) if seed is None else processor.draw(seed))
        sizes = np.array([sum(array.size for array in call.values()) for call in found], dtype=np.int64)
        padding = {one.name: None for one in processor.inputs}
        return Examples(found, padding, sizes=sizes, note=_NOTE + (_DRAWN if drawn else ""), full_call=True)

    def loss(self, outputs: Any, labels: torch.Tensor) -> torch.Tensor:
        """There is none. Raises `StageError`."""
        raise StageError("A graph of no task is not trained.")

    def collect(
        self, outputs: Mapping[str, np.ndarray], examples: Examples, indices: Sequence[int]
    ) -> CollectedOutputs:
        """Of each output its numbers, its largest along the last axis, and how many there are, [1, ...].

        Raises `ModelError` where an output is not a number, which no input of the original was proven to lead to.
        """
        import numpy as np

        kept: dict[str, np.ndarray] = {}
        for name, array in outputs.items():
            if array.dtype.kind not in "fiub":
                continue
            floats = array.astype(np.float32)
            if np.isnan(floats).any():
                raise ModelError(f"The output {name!r} is not a number for an input.", expected="finite outputs")
            kept[name] = _spread(floats)
            kept[_SIZE + name] = np.array([[array.size]], dtype=np.int64)
            if array.dtype.kind != "f":
                kept[_CHOICE + name] = _spread(array).astype(np.int64)
            elif array.ndim > 1 and array.shape[-1] > 1 and array.size:
                kept[_CHOICE + name] = _spread(array.argmax(axis=-1))
        return kept

    def measure(self, kept: CollectedOutputs, labels: np.ndarray | None, model: str, target: str) -> list[Measurement]:
        """Nothing: no row says what the answer should be."""
        return []

    def compare(
        self, kept: CollectedOutputs, reference: CollectedOutputs, model: str, target: str
    ) -> list[Measurement]:
        """How far outputs are from the reference's: see `compress.numerics.output_agreement`; the worst output counts.

        Beside them `agreement`, on how many calls all outputs choose alike.
        """
        import numpy as np

        from compress.numerics.output_agreement import output_agreement
        from compress.results.measurement import Measurement
        from compress.tasks.classes import agreement_row

        names = [name for name in reference if not name.startswith((_CHOICE, _SIZE))]
        found = [output_agreement(reference[name], kept[name]) for name in names]
        if not found:
            raise ModelError("The graph has no output of numbers.", expected="at least one to compare")
        calls = len(reference[names[0]])
        rows = [
            Measurement(model=model, metric=metric, target=target, value=float(value), unit=unit, n=calls)
            for metric, value, unit in (
                ("rms_error", max(one.rms for one in found), "ratio"),
                ("largest_error", max(one.largest for one in found), "ratio"),
                ("output_cosine", min(one.cosine for one in found), "ratio"),
            )
        ]
        same = np.ones(calls, dtype=bool)
        for name in reference:
            if name.startswith((_CHOICE, _SIZE)):
                same &= _alike(reference[name], kept[name])
        return [*rows, agreement_row(same, model, target)]

    def probabilities(self, kept: CollectedOutputs) -> np.ndarray | None:
        """None: nobody knows which output is one."""
        return None


def _spread(array: np.ndarray) -> np.ndarray:
    """All numbers of an output, or evenly spread ones, [1, n]."""
    flat = array.reshape(1, -1)
    step = -(-flat.shape[1] // _MOST)
    return flat[:, ::step]


def _alike(expected: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Whether all choices of each call [calls, n] are the same, [calls]."""
    import numpy as np

    if expected.shape != found.shape:
        return np.zeros(len(expected), dtype=bool)
    same: np.ndarray = (expected == found).all(axis=1)
    return same


TASK = GraphAgreement()
