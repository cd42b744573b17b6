"""Graph agreement: similarity of a graph's outputs to those of the original graph. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from compress.data.columns import Column
from compress.data.media import content, describe
from compress.data.source import INPUTS, seed_of
from compress.models.graph_inputs import GraphInputs
from compress.tasks.capability import READS_ROWS, SINGLE_CALL, TAKES_ARRAYS
from compress.tasks.classes import agreement_row, interval_row
from compress.tasks.lazy_modules import np, pa, torch
from compress.tasks.task import Examples, NamedArrays, Task, starter_recipe
from compress.utils.errors import DataError, ModelError, StageError

if TYPE_CHECKING:
    from transformers.utils import ModelOutput

    from compress.models.model import Processor, TorchModel
    from compress.results.report import Measurement

_MOST = 65_536
"""Largest number of values collected per output and call; larger outputs are subsampled evenly."""
_CHOICE, _SIZE = "choice of ", "size of "
_NOTE = (
    "only agreement with the original graph was measured, not accuracy: no task says what its outputs should be; "
    "name a task, and put the processor's files beside the graph, to measure that"
)
_DRAWN = "; inputs were drawn at random in the types and shapes that the graph states; real results may differ"


class GraphAgreement(Task):
    """Task of graphs without a known task: inputs are arrays with a batch axis, and all outputs are compared."""

    name = "graph-agreement"
    columns = (Column(INPUTS, kind="arrays"),)
    capabilities = frozenset({READS_ROWS, TAKES_ARRAYS, SINGLE_CALL})
    metrics = ("rms_error", "largest_error", "output_cosine", "agreement")
    batch_size = 1
    starter = starter_recipe(
        "my-graph",
        "an ONNX graph in INT8, compared with its float version",
        "model.onnx",
        {},
        {"onnx_int8": {"error_ceiling": 0.05}},
        {"metric": "rms_error", "at_most": 0.1},
    )
    data = MappingProxyType({"splits": {"train": "random:64", "test": "random:128"}})

    def load(self, directory: Path, labels: Sequence[str] | None, trust_remote_code: bool) -> TorchModel:
        """Raise `ModelError`: there is no torch model."""
        raise ModelError(
            "This task is for ONNX graphs.",
            where=str(directory),
            expected="an .onnx file as `model`",
            hint="give a checkpoint's recipe the task that it is for",
        )

    def input_names(self, processor: Processor) -> tuple[str, ...]:
        """Return the names of the graph's inputs.

        Args:
            processor: Inputs of the graph.
        """
        if isinstance(processor, GraphInputs):
            return tuple(graph_input.name for graph_input in processor.inputs)
        return super().input_names(processor)

    def encode(self, rows: pa.Table, processor: Processor, labels: Sequence[str] | None, max_length: int) -> Examples:
        """Return one call of the graph per row. Raises `DataError` for arrays that the graph does not accept.

        Args:
            rows: Rows with the task's columns; label columns are optional.
            processor: Processor of the model.
            labels: Class names of the model, or None to ignore labels.
            max_length: Number of tokens after which texts are truncated.
        """
        if not isinstance(processor, GraphInputs):
            raise DataError("The model does not accept plain arrays.", expected="an ONNX graph", where="task")
        calls, num_random = [], 0
        for value in rows[INPUTS].to_pylist():
            encoded = content(value)
            seed = seed_of(encoded)
            num_random += seed is not None
            calls.append(processor.read(encoded, describe(value)) if seed is None else processor.draw(seed))
        sizes = np.array([sum(array.size for array in call.values()) for call in calls], dtype=np.int64)
        padding = {graph_input.name: None for graph_input in processor.inputs}
        return Examples(calls, padding, sizes=sizes, note=_NOTE + (_DRAWN if num_random else ""), full_call=True)

    def loss(self, outputs: ModelOutput, labels: torch.Tensor) -> torch.Tensor:
        """Raise `StageError`: the task cannot be trained."""
        raise StageError("A graph without a task cannot be trained.")

    def collect(self, outputs: NamedArrays, examples: Examples, indices: Sequence[int]) -> NamedArrays:
        """Return for each output its values, its argmax along the last axis, and the number of values, [1, ...].

        Raises `ModelError` if an output is not finite.
        """
        collected: dict[str, np.ndarray] = {}
        for name, array in outputs.items():
            if array.dtype.kind not in "fiub":
                continue
            floats = array.astype(np.float32)
            if np.isnan(floats).any():
                raise ModelError(f"The output {name!r} is not a number for an input.", expected="finite outputs")
            collected[name] = _spread(floats)
            collected[_SIZE + name] = np.array([[array.size]], dtype=np.int64)
            if array.dtype.kind != "f":
                collected[_CHOICE + name] = _spread(array).astype(np.int64)
            elif array.ndim > 1 and array.shape[-1] > 1 and array.size:
                collected[_CHOICE + name] = _spread(array.argmax(axis=-1))
        return collected

    def measure(self, collected: NamedArrays, labels: np.ndarray | None, model: str, target: str) -> list[Measurement]:
        """Return nothing: rows have no reference answer.

        Args:
            collected: Collected outputs of all examples.
            labels: Labels of all examples.
            model: Name of the model in the report.
            target: Name of the target in the report.
        """
        return []

    def compare(self, collected: NamedArrays, reference: NamedArrays, model: str, target: str) -> list[Measurement]:
        """Return the distance of the worst output from the reference's (see `compress.numerics.output_agreement`).

        `agreement` is the share of calls for which the argmax of all outputs is equal.

        Args:
            collected: Collected outputs of the model.
            reference: Collected outputs of the baseline.
            model: Name of the model in the report.
            target: Name of the target in the report.
        """

        from compress.numerics.output_agreement import output_agreement

        names = [name for name in reference if not name.startswith((_CHOICE, _SIZE))]
        agreements = [output_agreement(reference[name], collected[name]) for name in names]
        if not agreements:
            raise ModelError("The graph has no numeric output.", expected="at least one to compare")
        calls = len(reference[names[0]])
        worst = {
            "rms_error": max(agreement.rms for agreement in agreements),
            "largest_error": max(agreement.largest for agreement in agreements),
            "output_cosine": min(agreement.cosine for agreement in agreements),
        }
        rows = [interval_row(name, (float(value), None, None), calls, model, target) for name, value in worst.items()]
        same = np.ones(calls, dtype=bool)
        for name in (name for name in reference if name.startswith((_CHOICE, _SIZE))):
            is_comparable = reference[name].shape == collected[name].shape
            same &= (reference[name] == collected[name]).all(axis=1) if is_comparable else False
        return [*rows, agreement_row(same, model, target)]


def _spread(array: np.ndarray) -> np.ndarray:
    """Return all values of an output, or an evenly spaced subset, [1, n]."""
    flat = array.reshape(1, -1)
    step = -(-flat.shape[1] // _MOST)
    return flat[:, ::step]


TASK = GraphAgreement()
