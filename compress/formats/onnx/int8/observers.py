"""Statistics of a graph's values on real inputs, from runs of the graph with additional outputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnxruntime

from compress.numerics.int8_activations import Histogram
from compress.utils.errors import DataError, StageError, first_line

Feed = Mapping[str, np.ndarray]
"""A batch: input name -> array of the type that the graph takes."""
_CPU = "CPUExecutionProvider"
_ERRORS_ONLY = 3


@dataclass
class ActivationStatistics:
    """Statistics of one tensor over all feeds: ``total`` is the sum [channels] of ``count`` positions."""

    histogram: Histogram = field(default_factory=Histogram)
    total: np.ndarray | None = None
    count: int = 0

    def add(self, values: np.ndarray, axis: int) -> None:
        """Add ``values``, whose channels lie along ``axis``."""
        self.histogram.add(values)
        if values.ndim < 2 or not values.size:
            return
        # Channels last, so that every row is one position.
        rows = np.moveaxis(values, axis, -1).reshape(-1, values.shape[axis])
        total = rows.sum(axis=0, dtype=np.float64)
        self.total = total if self.total is None else self.total + total
        self.count += len(rows)

    @property
    def mean(self) -> np.ndarray:
        """Mean of each channel."""
        assert self.total is not None, "a tensor with channels"
        mean: np.ndarray = self.total / self.count
        return mean


def observe(
    graph: onnx.ModelProto, channels: Mapping[str, int], feeds: Iterable[Feed]
) -> dict[str, ActivationStatistics]:
    """Return statistics of the float tensors in ``channels`` (name -> axis of the channels) over all ``feeds``.

    Raises `DataError` without a feed, and `StageError` for a value that is not finite, because no range covers it.
    """
    statistics = {name: ActivationStatistics() for name in channels}
    empty = True
    for values in stream_activations(graph, list(channels), feeds):
        empty = False
        for name, array in values.items():
            if not np.isfinite(array).all():
                raise StageError(
                    f"The activation {name!r} holds NaN or infinite values on the calibration data.",
                    expected="finite activations; an int8 range cannot cover infinity",
                    hint="look at the model's input and its export; masks filled with -inf belong to float operators",
                )
            statistics[name].add(array, channels[name])
    if empty:
        raise DataError(
            "There is no calibration data.",
            expected="at least one example in the train split",
            hint="give the recipe's data a train split with rows",
        )
    return statistics


def stream_activations(
    graph: onnx.ModelProto, names: Sequence[str], feeds: Iterable[Feed]
) -> Iterator[dict[str, np.ndarray]]:
    """Run ``graph`` on each feed and yield the tensors ``names``, which need not be outputs."""
    from compress.formats.onnx.runtimes.onnxruntime import FAILURES

    session = open_session(add_outputs(graph, names))
    inputs = {entry.name for entry in session.get_inputs()}
    computed = [name for name in names if name not in inputs]
    for feed in feeds:
        # Feeds may hold inputs that the graph does not take.
        batch = {name: array for name, array in feed.items() if name in inputs}
        if len(batch) < len(inputs):
            raise DataError(
                f"The calibration data lacks the input {sorted(inputs - batch.keys())[0]!r}.",
                expected=f"arrays for {', '.join(sorted(inputs))}",
            )
        try:
            values: list[np.ndarray] = session.run(computed, batch) if computed else []
        except FAILURES as error:
            shapes = ", ".join(f"{name} {array.dtype} {list(array.shape)}" for name, array in batch.items())
            raise DataError(
                f"The graph refuses the calibration data ({shapes}): {first_line(error)}",
                expected=", ".join(f"{entry.name} {entry.type} {entry.shape}" for entry in session.get_inputs()),
                hint="prepare the examples as the model was exported for; look at the files of its processor",
            ) from error
        yield {**dict(zip(computed, values, strict=True)), **{name: batch[name] for name in names if name in inputs}}


def add_outputs(graph: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """Return a copy of ``graph`` with the additional outputs ``names``."""
    changed = deepcopy(graph)
    existing = {value.name for value in (*changed.graph.output, *changed.graph.input)}
    # ONNX Runtime infers the type of an added output.
    changed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in existing)
    return changed


def open_session(graph: onnx.ModelProto) -> onnxruntime.InferenceSession:
    """Open a graph on the processor, logging errors only."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    return onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=[_CPU])
