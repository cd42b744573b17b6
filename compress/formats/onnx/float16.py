"""A float32 graph in float16, by ONNX Runtime's converter, and back; the proof that its answers are still the same."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from compress.formats.onnx.model import all_graphs
from compress.formats.onnx.runtimes.onnxruntime import FAILURES, OnnxSession, session_of
from compress.formats.prove import measure, of_session
from compress.formats.silence import silence
from compress.runtimes.runtime import Batch
from compress.tasks.task import Examples
from compress.utils.errors import IntegrityError, StageError

_EDGE = "compress: between float32 and an input or output of float16"
"""Marks a cast that stays."""
_LARGEST = float(np.finfo(np.float16).max)
_MASK = -1e30
"""What is below stands for minus infinity, in a mask: the converter makes it the lowest float16, which does as well."""
_TINY = float(np.finfo(np.float32).tiny)
_MEND = "name operators in keep, normalisation and softmax first: they sum what float16 can't hold"


def to_float16(graph: onnx.ModelProto, kept: Collection[str] = ()) -> onnx.ModelProto:
    """A copy with float16 weights and values; inputs and outputs stay float32, which clients give and expect.

    Operators that have no float16 form stay float32, as the converter's list has them, and so do those of the types in
    ``kept``. Raises `StageError` for weights that float16 cannot hold, and where nothing is left to convert.
    """
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    nodes = (node for one in all_graphs(graph.graph) for node in one.node)
    readers = {name for node in nodes if node.op_type in kept for name in node.input}
    for name, array in _floats(graph):
        if name not in readers and array.size and max(float(array.max()), -_lowest(array)) > _LARGEST:
            raise StageError(
                f"The tensor {name!r} holds values beyond float16's largest, 65,504.",
                expected="weights that float16 can hold",
                hint="name the operators that read it in keep, and they stay in float32",
            )
    source = onnx.ModelProto()
    source.CopyFrom(graph)
    with silence("logs"):
        made: onnx.ModelProto = convert_float_to_float16(
            source, keep_io_types=True, op_block_list=[*DEFAULT_OP_BLOCK_LIST, *kept]
        )
    # What was recorded of values in between is partly of the old types; the runtime infers it.
    del made.graph.value_info[:]
    if not holds_float16(made):
        raise StageError(
            "The graph holds nothing that could become float16.",
            expected="a graph with float32 weights, some of them of operators that are not in keep",
        )
    return made


def holds_float16(graph: onnx.ModelProto) -> bool:
    """Whether weights are stored in float16."""
    tensors = (tensor for one in all_graphs(graph.graph) for tensor in one.initializer)
    return any(tensor.data_type == TensorProto.FLOAT16 for tensor in tensors)


def to_float32(graph: onnx.ModelProto) -> onnx.ModelProto:
    """A copy that computes in float32 what ``graph`` does in float16; inputs and outputs keep their types."""
    made = onnx.ModelProto()
    made.CopyFrom(graph)
    _cast_at_edges(made.graph)
    _widen(made.graph)
    _drop_idle_casts(made.graph)
    return made


def _drop_idle_casts(graph: onnx.GraphProto) -> None:
    """Lead readers of stored float32 past casts to float32, in place: products look for stored weights."""
    stored = {tensor.name for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT}
    given = {value.name for value in graph.output}
    for node in list(graph.node):
        idle = node.op_type == "Cast" and node.input[0] in stored and node.attribute[0].i == TensorProto.FLOAT
        if idle and node.output[0] not in given:
            for reader in graph.node:
                if reader is not node:
                    _rename(reader, node.output[0], node.input[0])
            graph.node.remove(node)


def _cast_at_edges(graph: onnx.GraphProto) -> None:
    """Lead inputs and outputs of float16 through a `Cast`, in place."""
    halves = [value for value in (*graph.input, *graph.output) if _type(value) == TensorProto.FLOAT16]
    outputs = {value.name for value in graph.output}
    for value in halves:
        inner = f"{value.name}_float32"
        for node in graph.node:
            _rename(node, value.name, inner)
        wide = (value.name, inner) if value.name not in outputs else (inner, value.name)
        to = TensorProto.FLOAT if value.name not in outputs else TensorProto.FLOAT16
        cast = helper.make_node("Cast", [wide[0]], [wide[1]], name=f"{inner}_cast", to=to, doc_string=_EDGE)
        graph.node.insert(0 if to == TensorProto.FLOAT else len(graph.node), cast)


def _rename(node: onnx.NodeProto, old: str, new: str) -> None:
    """In the node and in those of its branches."""
    alone = onnx.GraphProto(node=[node])
    for names in (names for one in all_graphs(alone) for each in one.node for names in (each.input, each.output)):
        for place, name in enumerate(names):
            if name == old:
                names[place] = new
    node.CopyFrom(alone.node[0])


def _widen(graph: onnx.GraphProto) -> None:
    """Every stored tensor, type and cast of float16 as float32, in place, branches' too; but not casts at `_EDGE`."""
    for one in all_graphs(graph):
        for tensor in one.initializer:
            _widen_tensor(tensor)
        del one.value_info[:]
        for value in (*one.input, *one.output) if one is not graph else ():
            if _type(value) == TensorProto.FLOAT16:
                value.type.tensor_type.elem_type = TensorProto.FLOAT
        for node in one.node:
            if node.doc_string == _EDGE:
                node.doc_string = ""
                continue
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    _widen_tensor(attribute.t)
                if attribute.name in ("to", "dtype") and attribute.i == TensorProto.FLOAT16:
                    attribute.i = TensorProto.FLOAT


def _widen_tensor(tensor: onnx.TensorProto) -> None:
    if tensor.data_type == TensorProto.FLOAT16:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))


def _type(value: onnx.ValueInfoProto) -> int:
    return int(value.type.tensor_type.elem_type)


def _floats(graph: onnx.ModelProto) -> Iterator[tuple[str, np.ndarray]]:
    for tensor in (tensor for one in all_graphs(graph.graph) for tensor in one.initializer):
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
    exact, found = (of_session(one, examples) for one in _opened(graph, half))
    apart = measure(exact, found, examples)
    share = apart.worst / max(apart.highest - apart.lowest, _TINY)
    if not share <= tolerance:
        raise _differs(examples.answers_are, share, tolerance, "on padded batches")
    return share


def prove_float16_calls(
    half: onnx.ModelProto, graph: onnx.ModelProto, calls: Mapping[str, Batch], part: str, tolerance: float
) -> float:
    """`prove_float16` of a ``part`` that is called several times for an answer, on ``calls`` by what they are named.

    Raises `IntegrityError` for NaN or infinity too, with the call that they came of.
    """
    sessions = _opened(graph, half)
    worst, low, high = 0.0, np.inf, -np.inf
    for name, feed in calls.items():
        (exact, found) = (next(iter(session.predict(feed).values())).astype(np.float64) for session in sessions)
        if not np.isfinite(found).all():
            raise IntegrityError(
                f"In float16 there is NaN or infinity in what comes of {part}, at {name}.",
                expected="finite numbers, as in float32",
                hint=_MEND,
            )
        worst = max(worst, float(np.abs(exact - found).max()))
        low, high = min(low, float(exact.min())), max(high, float(exact.max()))
    share = worst / max(high - low, _TINY)
    if not share <= tolerance:
        raise _differs(f"answers of {part}", share, tolerance, f"in {len(calls)} calls of real sampling")
    return share


def _opened(*graphs: onnx.ModelProto) -> list[OnnxSession]:
    try:
        return [session_of(graph) for graph in graphs]
    except FAILURES as error:
        raise StageError(
            f"ONNX Runtime does not open the float16 graph: {str(error).splitlines()[0]}",
            hint="name the operators that it mentions in keep, and they stay in float32",
        ) from error


def _differs(what: str, share: float, tolerance: float, where: str) -> IntegrityError:
    return IntegrityError(
        f"In float16 the {what} differ from float32's by {share:.1%} of their range.",
        expected=f"at most {tolerance:.1%} {where}",
        hint=_MEND,
    )
