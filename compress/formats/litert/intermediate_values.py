"""Intermediate values of a LiteRT file, whose names are numbers."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from compress.formats.intermediate_values import MIN_WEIGHT_ELEMENTS, GraphStep, Run, ValueGraph, Values, pad_batches
from compress.formats.litert.model import read_litert
from compress.formats.target_profile import Target
from compress.utils.errors import InputError

_BITS = {"INT8": 8, "UINT8": 8, "INT16": 16, "INT4": 4, "UINT4": 4, "INT2": 2, "FLOAT16": 16}
_MOVED = (
    *("CAST", "CONCATENATION", "EXPAND_DIMS", "PACK", "RESHAPE", "SLICE", "SPLIT", "SQUEEZE", "STRIDED_SLICE"),
    *("TRANSPOSE", "UNPACK"),
)
"""Operators that only move or reshape values."""


def open_value_graph(file: Path, target: Target, length: int | None) -> ValueGraph:
    """Open the intermediate values of a file; see `compress.formats.spec.FormatSpec`."""
    graph = _Graph(file, length)
    return ValueGraph(graph.steps(), graph.outputs, graph.whole, graph.shaped)


class _Graph:
    """Graph of the shortest signature that holds ``length`` tokens, or the only graph."""

    def __init__(self, file: Path, length: int | None) -> None:
        from ai_edge_litert.tools import flatbuffer_utils

        content = file.read_bytes()
        read_litert(content, file)
        self._model = flatbuffer_utils.read_model_from_bytearray(bytearray(content))
        for buffer in self._model.buffers:
            # As a list, the buffer would be written byte by byte.
            buffer.data = None if buffer.data is None else np.asarray(buffer.data, np.uint8)
        self._signature = _signature_for(self._model, length, file)
        self._graph = self._model.subgraphs[self._signature.subgraphIndex]
        self._names = [tensor.name.decode() for tensor in self._graph.tensors]
        self._places = {name: index for index, name in enumerate(self._names)}
        self.outputs = [self._names[output.tensorIndex] for output in self._signature.outputs]

    def shaped(self, batches: Sequence[Values]) -> list[Values]:
        length = _length(self._model, self._signature)
        names = [tensor.name.decode() for tensor in self._signature.inputs]
        inputs: list[Values] = [{name: batch[name] for name in names} for batch in batches]
        return pad_batches(inputs, length) if length is not None else inputs

    def steps(self) -> Iterator[GraphStep]:
        from ai_edge_litert.tools.flatbuffer_utils import opcode_to_name, type_to_name

        tensors = self._graph.tensors
        for operator in self._graph.operators:
            kind = opcode_to_name(self._model, operator.opcodeIndex)
            reads = [index for index in operator.inputs if index >= 0]
            for output in operator.outputs:
                computes = kind not in _MOVED and type_to_name(tensors[output].type) == "FLOAT32"
                bits = min(_bits(tensors[index]) for index in (output, *reads))
                name = self._names[output]
                yield GraphStep(name, kind, name, [self._names[index] for index in reads], bits, computes)

    def whole(self, values: Sequence[str]) -> Run:
        """Return a function that runs the signature with ``values`` as its outputs."""
        from ai_edge_litert.interpreter import Interpreter
        from ai_edge_litert.schema_py_generated import TensorMapT
        from ai_edge_litert.tools.flatbuffer_utils import convert_object_to_bytearray

        # Shallow copies suffice, because only the outputs change.
        graph, signature, model = copy.copy(self._graph), copy.copy(self._signature), copy.copy(self._model)
        graph.outputs = [self._places[name] for name in values]
        signature.outputs = [TensorMapT(f"out_{number}", index) for number, index in enumerate(graph.outputs)]
        model.subgraphs = list(model.subgraphs)
        model.subgraphs[signature.subgraphIndex] = graph
        model.signatureDefs = [signature]
        interpreter = Interpreter(model_content=bytes(convert_object_to_bytearray(model)), num_threads=1)
        runner = interpreter.get_signature_runner()
        kinds = {name: details["dtype"] for name, details in runner.get_input_details().items()}

        def run(batch: Values) -> Values:
            outputs = runner(**{name: np.ascontiguousarray(batch[name], kind) for name, kind in kinds.items()})
            return {name: outputs[f"out_{number}"] for number, name in enumerate(values)}

        return run


def _signature_for(model: Any, length: int | None, file: Path) -> Any:
    """Return the shortest signature that holds ``length`` tokens; raise `InputError` if there is none."""
    for signature in sorted(model.signatureDefs or [], key=lambda signature: _length(model, signature) or 0):
        if (_length(model, signature) or 0) >= (length or 0):
            return signature
    raise InputError(
        f"No signature of {file.name} holds {length} tokens.", where=str(file), hint="write it with longer lengths"
    )


def _length(model: Any, signature: Any) -> int | None:
    """Return the number of tokens of a signature, or None if its inputs are not token ids."""
    tensors = model.subgraphs[signature.subgraphIndex].tensors
    shapes = [tensors[tensor.tensorIndex].shape for tensor in signature.inputs]
    return int(shapes[0][1]) if all(len(shape) == 2 for shape in shapes) else None


def _bits(tensor: Any) -> int:
    """Return the bits per number of a tensor; 32 for scales and indices."""
    from ai_edge_litert.tools.flatbuffer_utils import type_to_name

    return _BITS.get(type_to_name(tensor.type), 32) if np.prod(tensor.shape or 1) >= MIN_WEIGHT_ELEMENTS else 32
