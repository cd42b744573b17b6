"""OpenVINO's IR taken apart at its values, which have the names that they had in the ONNX graph it was made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from compress.formats.openvino.runtime import compile_model, read_model
from compress.formats.parts import Maker, Run, Step, Steps, Values
from compress.targets import Target

_FEW = 16
_BITS = {"i8": 8, "u8": 8, "i4": 4, "u4": 4, "f16": 16}
_NO_OPERATORS = ("Constant", "Parameter", "Result")


def open_parts(file: Path, target: Target, length: int | None) -> OpenVinoParts:
    """See `compress.formats.spec.FormatSpec`."""
    return OpenVinoParts(file)


class OpenVinoParts:
    """The one IR of a folder, or the file."""

    def __init__(self, artifact: Path) -> None:
        self._artifact = artifact
        self._model = read_model(artifact)

    @cached_property
    def makers(self) -> Mapping[str, Maker]:
        """See `Parts`."""
        return {
            name: Maker(operator.get_type_name(), operator.get_friendly_name())
            for name, operator in _named(self._model).items()
        }

    @property
    def outputs(self) -> Sequence[str]:
        """See `Parts`."""
        return [output.any_name for output in self._model.outputs]

    def whole(self, values: Sequence[str]) -> Run:
        """See `Parts`."""
        import openvino

        model = self._model.clone()
        named = _named(model)
        results = [openvino.opset13.result(_port(named[name], name)) for name in values]
        request = compile_model(openvino.Model(results, model.get_parameters())).create_infer_request()
        inputs = {port.any_name: port.get_element_type().to_dtype() for port in model.inputs}

        def run(batch: Values) -> Values:
            found = request.infer({name: batch[name].astype(kind, copy=False) for name, kind in inputs.items()})
            return {name: np.array(found[place]) for place, name in enumerate(values)}

        return run

    def bits(self, cuts: Sequence[str]) -> Mapping[str, int]:
        """See `Parts`."""
        named = _named(self._model)
        steps = Steps(_step(one) for one in self._model.get_ordered_ops() if one.get_type_name() not in _NO_OPERATORS)
        bits = steps.bits([named[name].get_friendly_name() for name in cuts])
        return {name: bits[named[name].get_friendly_name()] for name in cuts}


def _named(model: Any) -> dict[str, Any]:
    """Value's name -> the operator that makes it."""
    return {
        name: operator
        for operator in model.get_ordered_ops()
        if operator.get_type_name() not in _NO_OPERATORS
        for output in operator.outputs()
        for name in output.get_names()
    }


def _port(operator: Any, name: str) -> Any:
    return next(output for output in operator.outputs() if name in output.get_names())


def _step(operator: Any) -> Step:
    """The fewest bits of what it reads, by the names of operators."""
    before = [port.get_source_output().get_node() for port in operator.inputs()]
    stored = [one for one in before if one.get_type_name() == "Constant" and np.prod(list(one.shape)) >= _FEW]
    bits = [_BITS.get(one.get_element_type().get_type_name(), 32) for one in stored]
    name, kind = operator.get_friendly_name(), operator.get_type_name()
    reads = [one.get_friendly_name() for one in before if one.get_type_name() != "Constant"]
    return Step(name, kind, reads, min([8 if kind == "FakeQuantize" else 32, *bits]))
