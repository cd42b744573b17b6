"""Names in a LiteRT file: those of the model's parameters, in place of every scope that the converter went through."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

LOOKED_UP = ".looked_up"
"""Ends the name of what a look-up gives, which begins with its table's: quantization recipes name operators so."""


def named_after(content: bytes, parameters: Mapping[str, np.ndarray]) -> bytes:
    """The same file, shorter: a stored tensor gets the name of the parameter whose values it has, perhaps transposed.

    Others, and what operators give, are numbered. Names are unique in the file; those of signatures stay.
    """
    from ai_edge_litert.tools import flatbuffer_utils

    model = flatbuffer_utils.read_model_from_bytearray(content)
    known = _by_values(parameters)
    for place, graph in enumerate(model.subgraphs):
        end = f"@{place}" if place else ""
        names = [_name(model, tensor, index, known) for index, tensor in enumerate(graph.tensors)]
        for operator in graph.operators:
            if flatbuffer_utils.opcode_to_name(model, operator.opcodeIndex) == "EMBEDDING_LOOKUP":
                names[operator.outputs[0]] = f"{names[operator.inputs[1]]}{LOOKED_UP}"
        for tensor, name in zip(graph.tensors, names, strict=True):
            tensor.name = f"{name}{end}"
    _tell_apart([tensor for graph in model.subgraphs for tensor in graph.tensors])
    return bytes(flatbuffer_utils.convert_object_to_bytearray(model))


def _name(model: Any, tensor: Any, index: int, known: Mapping[str, str]) -> str:
    data = model.buffers[tensor.buffer].data
    if data is None or len(data) == 0:
        return f"value_{index}"
    return known.get(_digest(np.asarray(data)), f"constant_{index}")


def _by_values(parameters: Mapping[str, np.ndarray]) -> dict[str, str]:
    names: dict[str, str] = {}
    for name, values in parameters.items():
        for one in (values, values.T):
            names.setdefault(_digest(np.frombuffer(np.ascontiguousarray(one).tobytes(), np.uint8)), name)
    return names


def _digest(data: np.ndarray) -> str:
    return hashlib.sha256(data.tobytes()).hexdigest()


def _tell_apart(tensors: list[Any]) -> None:
    """Number tensors that share a name with another tensor."""
    seen: Counter[str] = Counter()
    for tensor in tensors:
        name = tensor.name
        seen[name] += 1
        if seen[name] > 1:
            tensor.name = f"{name}#{seen[name]}"
