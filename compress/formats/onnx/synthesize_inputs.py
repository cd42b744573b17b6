"""Synthesis of inputs that an unknown graph accepts: sizes of dynamic axes and values, found by trial.

A graph states types, fixed sizes and names of axes. The rest is guessed: the first axis is the batch, an image is
square, integers that index a table are below its number of rows, a mask is full, and a length is that of the input
that it describes. The first guess that ONNX Runtime answers with finite numbers is used.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import product

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

from compress.formats.onnx.graph_reader import axes_of
from compress.formats.onnx.runtimes.onnxruntime import FAILURES
from compress.models.graph_inputs import GraphInput, GraphInputs
from compress.utils.errors import first_line

_IMAGE = (224, 64, 320, 640, 32, 48, 128, 256, 512)
_TOKENS = (32, 16, 8, 64, 128, 1)
_SIGNAL = (16_000, 512, 576, 64, 100, 32, 256, 400, 1024, 48_000, 160_000)
_SAMPLING_RATE = 16_000
_RATE, _LENGTH, _MASK = (re.compile(pattern) for pattern in (r"(^|_)(sr|.*rate)$", r"len(gth)?s?$", r"mask"))
_THROUGH = ("Cast", "Unsqueeze", "Squeeze", "Reshape", "Identity", "Slice", "Expand", "Concat", "Flatten", "Clip")
"""Operators that preserve the meaning of an integer."""
_FATAL_ONLY = 4
_FEW = 16
"""Upper bound for integers of unknown meaning."""


def synthesize_inputs(graph: onnx.ModelProto, session: onnxruntime.InferenceSession) -> GraphInputs:
    """Return the inputs of ``graph``, opened as ``session``, with arrays that it answers if any are found."""
    # Failed attempts are expected, so ONNX Runtime must not log them.
    quiet = onnxruntime.RunOptions()
    quiet.log_severity_level = _FATAL_ONLY
    stored = {tensor.name for tensor in graph.graph.initializer}
    entries = [entry for entry in graph.graph.input if entry.name not in stored]
    reason, first = "it has no inputs", None
    for inputs in _guesses(graph.graph, entries):
        first = first or inputs
        tried = GraphInputs(inputs)
        try:
            answers = session.run(None, tried.draw(0), quiet)
        except (*FAILURES, TypeError, ValueError) as error:
            reason = first_line(error)
            continue
        wrong = [array for array in answers if isinstance(array, np.ndarray) and array.dtype.kind == "f"
                 and np.isnan(array).any()]  # fmt: skip
        if not wrong:
            return tried
        reason = "the inputs that were tried give NaN"
    return GraphInputs(first or (), f"it fails for every input shape that was tried: {reason}")


def _guesses(graph: onnx.GraphProto, entries: Sequence[onnx.ValueInfoProto]) -> Iterator[tuple[GraphInput, ...]]:
    """Yield candidate inputs: sizes that grow from attempt to attempt."""
    axes = {entry.name: axes_of(entry) for entry in entries}
    # A dynamic axis without a name is identified by its position.
    keys = {
        name: [f"{name}/{index}" if axis is None else axis for index, axis in enumerate(input_axes)]
        for name, input_axes in axes.items()
    }
    dtypes = {entry.name: _dtype(entry) for entry in entries}
    tables = {entry.name: _table_rows(graph, entry.name) for entry in entries if dtypes[entry.name].startswith("int")}
    # Text inputs cannot be synthesized.
    if any(dtype == "str" for dtype in dtypes.values()):
        yield tuple(GraphInput(name, dtypes[name], axes[name], ()) for name in axes)
        return
    # First only the first input grows; then all do.
    for alone, attempt in product((True, False), range(max(map(len, (_IMAGE, _TOKENS, _SIGNAL))))):
        # A name has one size everywhere.
        sizes: dict[int | str, int] = {}
        for name, input_axes in axes.items():
            first, integers, rank = name == next(iter(axes)), dtypes[name].startswith("int"), len(input_axes)
            candidates = _IMAGE if rank == 4 else _TOKENS if integers else _SIGNAL
            for index, (axis, key) in enumerate(zip(input_axes, keys[name], strict=True)):
                # The first axis is the batch, and a list of integers holds one.
                single = index == 0 and (rank > 1 or integers)
                if isinstance(axis, int):
                    sizes[axis] = axis
                elif single or (alone and not first and axis is None):
                    sizes.setdefault(key, 1)
                else:
                    sizes.setdefault(key, candidates[min(attempt, len(candidates) - 1)])
        shapes = {name: tuple(sizes[key] for key in input_keys) for name, input_keys in keys.items()}
        longest = max((shape[-1] for name, shape in shapes.items() if len(shape) > 1), default=1)
        yield tuple(
            GraphInput(name, dtypes[name], axes[name], shapes[name], *_filling(name, dtypes[name], tables, longest))
            for name in axes
        )


def _filling(name: str, dtype: str, tables: Mapping[str, int | None], longest: int) -> tuple[float | None, int | None]:
    """Return the constant value of an input, or the bound of its integers; neither for normally distributed inputs.

    Args:
        name: Name of the input.
        dtype: Its numpy type.
        tables: Number of rows of the table that each integer input indexes.
        longest: Size of the longest last axis, for inputs that hold a length.
    """
    plain = name.lower()
    # The name reveals the meaning of an input: a mask is all ones, a rate the usual one, a length the longest axis.
    if _MASK.search(plain) or dtype == "bool":
        return 1, None
    if dtype in ("uint8", "int8") or not dtype.startswith(("int", "uint")):
        return None, {"uint8": 256, "int8": 128}.get(dtype)
    if _RATE.search(plain):
        return _SAMPLING_RATE, None
    return (longest, None) if _LENGTH.search(plain) else (None, tables.get(name) or _FEW)


def _dtype(entry: onnx.ValueInfoProto) -> str:
    """Return the numpy type of an input."""
    number = entry.type.tensor_type.elem_type
    if number == TensorProto.STRING:
        return "str"
    return str(np.dtype(helper.tensor_dtype_to_np_dtype(number)).name) if number else "float32"


def _table_rows(graph: onnx.GraphProto, name: str) -> int | None:
    """Return the fewest rows of a stored table that an input indexes; None if it indexes none."""
    stored = {tensor.name: tensor.dims for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
            stored[node.output[0]] = node.attribute[0].t.dims
    reached, row_counts = {name}, []
    for node in graph.node:
        if node.op_type == "Gather" and len(node.input) > 1 and node.input[1] in reached and node.input[0] in stored:
            row_counts.append(stored[node.input[0]][0])
        # The index may be reshaped or cast before it is looked up.
        elif node.op_type in _THROUGH and reached.intersection(node.input):
            reached.update(node.output)
    return min((int(rows) for rows in row_counts), default=None)
