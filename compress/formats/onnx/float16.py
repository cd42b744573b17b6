"""Conversion of a float32 graph to float16 by ONNX Runtime's converter, and the numerical comparison."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from copy import deepcopy

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from compress.formats.onnx.model import all_graphs
from compress.formats.onnx.runtimes.onnxruntime import FAILURES, OnnxSession, session_of
from compress.formats.parity import measure_distance, session_answers
from compress.formats.quiet_output import suppress_output
from compress.formats.runtime import Batch
from compress.tasks.task import Examples
from compress.utils.errors import IntegrityError, StageError

_LARGEST = float(np.finfo(np.float16).max)
_MASK = -1e30
"""Values below this stand for minus infinity in a mask. The converter replaces them by the lowest float16."""
_TINY = float(np.finfo(np.float32).tiny)
_MEND = "name operators in keep, normalisation and softmax first: they sum what float16 can't hold"


def to_float16(graph: onnx.ModelProto, float32_operators: Collection[str] = ()) -> onnx.ModelProto:
    """Return a copy with float16 weights and values; inputs and outputs stay float32 as clients expect.

    Operators without a float16 form, which the converter lists, and those of the types in ``float32_operators`` stay
    float32.

    Raises:
        StageError: Weights exceed float16's range, or nothing can be converted.
    """
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    graphs = list(all_graphs(graph.graph))
    # Weights of operators that stay float32 may have any size.
    kept_nodes = [node for subgraph in graphs for node in subgraph.node if node.op_type in float32_operators]
    readers = {name for node in kept_nodes for name in node.input}
    for tensor in (tensor for subgraph in graphs for tensor in subgraph.initializer):
        if tensor.data_type != TensorProto.FLOAT or tensor.name in readers or 0 in tensor.dims:
            continue
        array = numpy_helper.to_array(tensor)
        # Values at or below `_MASK` are attention masks, which may be clipped.
        if max(float(array.max()), -float(array[array > _MASK].min(initial=0.0))) > _LARGEST:
            raise StageError(
                f"The tensor {tensor.name!r} holds values beyond float16's largest, 65,504.",
                expected="weights that float16 can hold",
                hint="name the operators that read it in keep, and they stay in float32",
            )
    with suppress_output("logs"):
        converted: onnx.ModelProto = convert_float_to_float16(
            deepcopy(graph), keep_io_types=True, op_block_list=[*DEFAULT_OP_BLOCK_LIST, *float32_operators]
        )
    # What was recorded of values in between is partly of the old types; the runtime infers it.
    del converted.graph.value_info[:]
    if not holds_float16(converted):
        raise StageError(
            "The graph has no weights to convert to float16.",
            expected="a graph with float32 weights, some of them of operators that are not in keep",
        )
    return converted


def holds_float16(graph: onnx.ModelProto) -> bool:
    """Return whether weights are stored in float16."""
    tensors = (tensor for subgraph in all_graphs(graph.graph) for tensor in subgraph.initializer)
    return any(tensor.data_type == TensorProto.FLOAT16 for tensor in tensors)


def verify_float16(half: onnx.ModelProto, graph: onnx.ModelProto, examples: Examples, tolerance: float) -> float:
    """Return the largest difference of an answer's entry from ``graph``'s, as a share of the range of ``graph``'s.

    Both graphs answer padded batches and a single example.

    Args:
        half: The float16 graph.
        graph: The float32 graph.
        examples: Examples to compare on.
        tolerance: Largest accepted share.

    Raises:
        IntegrityError: The share is larger than ``tolerance``.
        StageError: A graph does not open.
    """
    exact, rounded = (session_answers(opened, examples) for opened in _opened(graph, half))
    differences = measure_distance(exact, rounded, examples)
    span = differences.highest - differences.lowest
    return _checked_share(differences.worst, span, tolerance, examples.answer_label, "on padded batches")


def verify_float16_calls(
    half: onnx.ModelProto, graph: onnx.ModelProto, calls: Mapping[str, Batch], part: str, tolerance: float
) -> float:
    """Compare a part that runs several times for one answer, as `verify_float16` does.

    Args:
        half: The float16 graph.
        graph: The float32 graph.
        calls: Inputs of each call by a label for messages.
        part: Name of the part for messages.
        tolerance: Largest accepted share.

    Returns:
        The largest difference as a share of the range.

    Raises:
        IntegrityError: The share is larger than ``tolerance``, or an output is not finite.
    """
    sessions = _opened(graph, half)
    worst, low, high = 0.0, np.inf, -np.inf
    for name, feed in calls.items():
        # Each part has one output.
        (exact, rounded) = (next(iter(session.predict(feed).values())).astype(np.float64) for session in sessions)
        if not np.isfinite(rounded).all():
            raise IntegrityError(
                f"In float16 the output of {part} holds NaN or infinity, at {name}.",
                expected="finite numbers, as in float32",
                hint=_MEND,
            )
        worst = max(worst, float(np.abs(exact - rounded).max()))
        low, high = min(low, float(exact.min())), max(high, float(exact.max()))
    where = f"in {len(calls)} calls of real sampling"
    return _checked_share(worst, high - low, tolerance, f"answers of {part}", where)


def _opened(*graphs: onnx.ModelProto) -> list[OnnxSession]:
    """Open graphs on the processor. Raises `StageError` where ONNX Runtime refuses one."""
    try:
        return [session_of(graph) for graph in graphs]
    except FAILURES as error:
        raise StageError(
            f"ONNX Runtime does not open the float16 graph: {str(error).splitlines()[0]}",
            hint="name the operators that it mentions in keep, and they stay in float32",
        ) from error


def _checked_share(worst: float, span: float, tolerance: float, what: str, where: str) -> float:
    """Return the largest difference as a share of the answers' span. Raises `IntegrityError` above ``tolerance``."""
    share = worst / max(span, _TINY)
    if not share <= tolerance:
        raise IntegrityError(
            f"In float16 the {what} differ from float32's by {share:.1%} of their range.",
            expected=f"at most {tolerance:.1%} {where}",
            hint=_MEND,
        )
    return share
