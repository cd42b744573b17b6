"""Intermediate values of OpenVINO's IR, which have the names of the ONNX graph that it was converted from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from compress.formats.openvino.runtime import compile_model, read_model
from compress.formats.parts import FEW, Parts, Run, Step, Values
from compress.formats.target_profile import Target

_BITS = {"i8": 8, "u8": 8, "i4": 4, "u4": 4, "f16": 16}
_NO_OPERATORS = ("Constant", "Parameter", "Result")


def open_parts(file: Path, target: Target, length: int | None) -> Parts:
    """See `compress.formats.spec.FormatSpec`."""
    model = read_model(file)
    return Parts(_steps(model), [output.any_name for output in model.outputs], lambda values: _run(model, values))


def _run(model: Any, values: Sequence[str]) -> Run:
    import openvino

    changed = model.clone()
    ports = {name: port for port in _ports(changed) for name in port.get_names()}
    results = [openvino.opset13.result(ports[name]) for name in values]
    changed = openvino.Model(results, changed.get_parameters())
    request = compile_model(changed).create_infer_request()
    inputs = {port.any_name: port.get_element_type().to_dtype() for port in changed.inputs}

    def run(batch: Values) -> Values:
        found = request.infer({name: batch[name].astype(kind, copy=False) for name, kind in inputs.items()})
        return {name: np.array(found[place]) for place, name in enumerate(values)}

    return run


def _ports(model: Any) -> Iterator[Any]:
    """Yield the outputs of all operators, in their order."""
    for operator in model.get_ordered_ops():
        if operator.get_type_name() not in _NO_OPERATORS:
            yield from operator.outputs()


def _steps(model: Any) -> Iterator[Step]:
    """Of each name of a value; one without has its operator's and its place there, which no name has."""
    for port in _ports(model):
        operator = port.get_node()
        before = [one.get_source_output() for one in operator.inputs()]
        stored = [one.get_node() for one in before if one.get_node().get_type_name() == "Constant"]
        weights = [one for one in stored if np.prod(list(one.shape)) >= FEW]
        kind, name = operator.get_type_name(), operator.get_friendly_name()
        bits = [_BITS.get(one.get_element_type().get_type_name(), 32) for one in weights]
        reads = [_name(one) for one in before if one.get_node().get_type_name() != "Constant"]
        for value in port.get_names() or [_name(port)]:
            yield Step(value, kind, name, reads, min([8 if kind == "FakeQuantize" else 32, *bits]))


def _name(port: Any) -> str:
    names: set[str] = port.get_names()
    return min(names) if names else f"{port.get_node().get_friendly_name()}\0{port.get_index()}"
