"""What a graph takes and gives, read from the graph itself: to write a manifest, and to catch one that lies."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from compress.bundle.kind import Kind
from compress.bundle.manifest import TensorRecord
from compress.errors import ModelError
from compress.runtimes import get_runtime
from compress.runtimes.runtime import Session, TensorType
from compress.targets import TARGETS

_CPU = TARGETS["cpu"]
_INTEGER = ("QLinear", "MatMulInteger", "ConvInteger", "QAttention", "QGemm", "DynamicQuantize", "QuantizeLinear")


class Shape(NamedTuple):
    """Of a graph."""

    inputs: tuple[TensorRecord, ...]
    outputs: tuple[TensorRecord, ...]


class Contents(NamedTuple):
    """Operator domains with their versions, whether products are of 8-bit integers, and bytes of what is stored.

    ``stored`` is name -> (numpy's type name, shape, bytes).
    """

    opsets: dict[str, int]
    integers: bool
    stored: dict[str, tuple[str, tuple[int, ...], int]]


def open_graph(path: Path) -> Session:
    """The graph through ONNX Runtime on this machine's processor."""
    return get_runtime(_CPU.runtime).open(path, _CPU, 1)


def shape_of(session: Session, kind: Kind, where: str) -> Shape:
    """Its inputs and outputs. Raises `ModelError` for a graph that no model of that kind has."""
    inputs, outputs = session.input_types, session.output_types
    names = inputs.keys() | outputs.keys()
    if names - kind.meanings.keys() or kind.required - names:
        optional = sorted(kind.meanings.keys() - kind.required)
        perhaps = f", perhaps {', '.join(optional)}" if optional else ""
        raise ModelError(
            f"The graph takes {', '.join(inputs)} and gives {', '.join(outputs)}.",
            where=where,
            expected=f"{', '.join(sorted(kind.required))}{perhaps}: those of {kind.task}",
            mend="write it with the stage export of `compress`",
        )
    return Shape(_records(inputs, kind), _records(outputs, kind))


def _records(types: Mapping[str, TensorType], kind: Kind) -> tuple[TensorRecord, ...]:
    return tuple(
        TensorRecord(
            name=name,
            dtype=found.dtype,
            shape=tuple("any" if axis is None else axis for axis in found.shape),
            meaning=kind.meanings[name],
        )
        for name, found in types.items()
    )


def contents_of(path: Path) -> Contents:
    """What the file holds; weights aren't loaded. In ONNX Runtime's own format it is read without its versions."""
    if path.suffix == ".ort":
        from compress.inspect.ort_graph import read_ort_graph

        graph, opsets = read_ort_graph(path), {}
    else:
        import onnx

        from compress.inspect.onnx_graph import read_graph

        graph = read_graph(path)
        model = onnx.load(path, load_external_data=False)
        opsets = {entry.domain or "ai.onnx": entry.version for entry in model.opset_import}
    integers = any(node.op_type.startswith(_INTEGER) for node in graph.nodes)
    stored = {one.name: (one.dtype, one.shape, one.bytes) for one in graph.initializers}
    return Contents(dict(sorted(opsets.items())), integers, stored)
