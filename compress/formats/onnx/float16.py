"""A float32 graph in float16, by ONNX Runtime's converter, and the proof that its answers are still the same."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from compress.errors import IntegrityError, StageError
from compress.formats.onnx.runtimes.onnxruntime import FAILURES, session_of
from compress.formats.prove import measure, of_session
from compress.formats.silence import silence
from compress.tasks.task import Examples

_LARGEST = float(np.finfo(np.float16).max)
_MASK = -1e30
"""What is below stands for minus infinity, in a mask: the converter makes it the lowest float16, which does as well."""


def to_float16(graph: onnx.ModelProto, kept: Collection[str] = ()) -> onnx.ModelProto:
    """A copy with float16 weights and values; inputs and outputs stay float32, which clients give and expect.

    Operators that have no float16 form stay float32, as the converter's list has them, and so do those of the types in
    ``kept``. Raises `StageError` for weights that float16 cannot hold, and where nothing is left to convert.
    """
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    readers = {name for node in graph.graph.node if node.op_type in kept for name in node.input}
    for name, array in _floats(graph):
        if name not in readers and array.size and max(float(array.max()), -_lowest(array)) > _LARGEST:
            raise StageError(
                f"The tensor {name!r} holds values beyond float16's largest, 65,504.",
                expected="weights that float16 can hold",
                mend="name the operators that read it in keep, and they stay in float32",
            )
    source = onnx.ModelProto()
    source.CopyFrom(graph)
    with silence("logs"):
        made: onnx.ModelProto = convert_float_to_float16(
            source, keep_io_types=True, op_block_list=[*DEFAULT_OP_BLOCK_LIST, *kept]
        )
    # What was recorded of values in between is partly of the old types; the runtime infers it.
    del made.graph.value_info[:]
    if not any(tensor.data_type == TensorProto.FLOAT16 for tensor in made.graph.initializer):
        raise StageError(
            "The graph holds nothing that could become float16.",
            expected="a graph with float32 weights, some of them of operators that are not in keep",
        )
    return made


def _floats(graph: onnx.ModelProto) -> Iterator[tuple[str, np.ndarray]]:
    for tensor in graph.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            yield tensor.name, numpy_helper.to_array(tensor)


def _lowest(array: np.ndarray) -> float:
    """The lowest value that is no mask."""
    return float(array[array > _MASK].min(initial=0.0))


def prove_float16(half: onnx.ModelProto, graph: onnx.ModelProto, examples: Examples, tolerance: float) -> float:
    """The largest difference of an answer's entry from ``graph``'s over how far ``graph``'s lie apart.

    On padded batches and a single example. Raises `IntegrityError` above ``tolerance``, `StageError` for a graph that
    does not open.
    """
    try:
        exact, found = (of_session(session_of(one), examples) for one in (graph, half))
    except FAILURES as error:
        raise StageError(
            f"ONNX Runtime does not open the float16 graph: {str(error).splitlines()[0]}",
            mend="name the operators that it mentions in keep, and they stay in float32",
        ) from error
    apart = measure(exact, found, examples)
    share = apart.worst / max(apart.highest - apart.lowest, float(np.finfo(np.float32).tiny))
    if not share <= tolerance:
        raise IntegrityError(
            f"In float16 the {examples.answers_are} differ from float32's by {share:.1%} of their range.",
            expected=f"at most {tolerance:.1%} on padded batches",
            mend="name operators in keep, normalisation and softmax first: they sum what float16 can't hold",
        )
    return share
