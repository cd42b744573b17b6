"""What the values in a graph are like on real inputs: run it with more outputs, and keep statistics only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnxruntime

from compress.numerics.activation_range import Histogram
from compress.utils.errors import DataError, StageError, first_line

Feed = Mapping[str, np.ndarray]
"""A batch: input's name -> array of the type that the graph takes."""
_CPU = "CPUExecutionProvider"
_ERRORS_ONLY = 3


@dataclass
class TensorStatistics:
    """One tensor over all feeds. ``largest`` and ``total`` are [channels]: greatest magnitude, and sum."""

    histogram: Histogram = field(default_factory=Histogram)
    largest: np.ndarray | None = None
    total: np.ndarray | None = None
    count: int = 0

    def add(self, values: np.ndarray, axis: int) -> None:
        """Count ``values``, whose channels lie along ``axis``."""
        self.histogram.add(values)
        if values.ndim < 2 or not values.size:
            return
        rows = np.moveaxis(values, axis, -1).reshape(-1, values.shape[axis])
        largest, total = np.abs(rows).max(axis=0), rows.sum(axis=0, dtype=np.float64)
        self.largest = largest if self.largest is None else np.maximum(self.largest, largest)
        self.total = total if self.total is None else self.total + total
        self.count += len(rows)

    @property
    def mean(self) -> np.ndarray:
        """Of each channel."""
        assert self.total is not None, "a tensor with channels"
        mean: np.ndarray = self.total / self.count
        return mean


def observe(graph: onnx.ModelProto, channels: Mapping[str, int], feeds: Iterable[Feed]) -> dict[str, TensorStatistics]:
    """Statistics of the float tensors in ``channels`` (name -> axis of the channels) over all ``feeds``.

    Raises `DataError` where there is no feed, `StageError` where a value is not finite: what to quantize it to is
    unknown then.
    """
    found = {name: TensorStatistics() for name in channels}
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
            found[name].add(array, channels[name])
    if empty:
        raise DataError(
            "There is nothing to calibrate with.",
            expected="at least one example in the train split",
            hint="give the recipe's data a train split with rows",
        )
    return found


def stream_activations(
    graph: onnx.ModelProto, names: Sequence[str], feeds: Iterable[Feed]
) -> Iterator[dict[str, np.ndarray]]:
    """Run ``graph`` on each feed and yield the tensors ``names``, which need not be outputs of it."""
    session = open_session(add_outputs(graph, names))
    inputs = {entry.name for entry in session.get_inputs()}
    own = [name for name in names if name not in inputs]
    for feed in feeds:
        given = {name: array for name, array in feed.items() if name in inputs}
        if len(given) < len(inputs):
            raise DataError(
                f"The calibration data lacks the input {sorted(inputs - given.keys())[0]!r}.",
                expected=f"arrays for {', '.join(sorted(inputs))}",
            )
        values = _run(session, own, given) if own else []
        yield {**dict(zip(own, values, strict=True)), **{name: given[name] for name in names if name in inputs}}


def _run(session: onnxruntime.InferenceSession, names: Sequence[str], given: Feed) -> list[np.ndarray]:
    from compress.formats.onnx.runtimes.onnxruntime import FAILURES

    try:
        values: list[np.ndarray] = session.run(names, given)
    except FAILURES as error:
        shapes = ", ".join(f"{name} {array.dtype} {list(array.shape)}" for name, array in given.items())
        raise DataError(
            f"The graph refuses the calibration data ({shapes}): {first_line(error)}",
            expected=", ".join(f"{entry.name} {entry.type} {entry.shape}" for entry in session.get_inputs()),
            hint="prepare the examples as the model was exported for; look at the files of its processor",
        ) from error
    return values


def add_outputs(graph: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """A copy of ``graph`` whose outputs are ``names`` beside its own."""
    changed = onnx.ModelProto()
    changed.CopyFrom(graph)
    known = {value.name for value in (*changed.graph.output, *changed.graph.input)}
    changed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in known)
    return changed


def open_session(graph: onnx.ModelProto) -> onnxruntime.InferenceSession:
    """On the processor, errors only."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    return onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=[_CPU])
