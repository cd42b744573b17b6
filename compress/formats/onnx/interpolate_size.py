"""A graph of other widths, from two that differ in nothing else: what it would weigh, without its being made.

Whatever whole number differs between the two must follow one of the widths: `number = factor x width + rest`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from compress.utils.errors import ModelError

Widths = Mapping[str, int]
"""How many of each sort there are: heads of a layer, neurons, tokens."""
FieldPath = tuple[tuple[str, int | None], ...]
"""Fields from the root of a message, each with its place where it is repeated."""
_SHAPES = (TensorProto.INT64, TensorProto.INT32)
_FEW = 64
"""Values of a stored tensor of whole numbers that are read as sizes."""
_LARGEST_FACTOR = 1 << 20
_KEPT_BYTES = 4096
"""Of each stored tensor, to fill it with."""
_MARKED_FROM_BYTES = 1024
"""ONNX keeps tensors from here on in another file where it is told to, and leaves a mark when it reads them back."""


@dataclass(frozen=True)
class LinearRule:
    """``factor`` x a width + ``rest``."""

    width: str
    factor: Fraction
    rest: Fraction

    def at(self, widths: Widths) -> int:
        """The number at other widths. Raises `ModelError` where it would be no whole number."""
        found = self.factor * widths[self.width] + self.rest
        if found.denominator != 1 or found < 0:
            raise ModelError(f"A width of {widths[self.width]} {self.width} gives a size of {found}.")
        return int(found)


def fit_rule(one: int, other: int, widths: Widths, changed: Widths) -> LinearRule:
    """How a number follows a width, from its values at two sets of them.

    One that is a multiple of a width is taken for that before any other. Raises `ModelError` where none, or more than
    one, could be meant.
    """
    found = []
    for name, width in widths.items():
        step = changed[name] - width
        if step:
            factor = Fraction(other - one, step)
            found.append(LinearRule(name, factor, one - factor * width))
    multiples = [rule for rule in found if rule.rest == 0]
    likely = multiples or [rule for rule in found if rule.factor.denominator == 1 and rule.factor <= _LARGEST_FACTOR]
    if len(likely) != 1:
        raise ModelError(f"Whether {one} and {other} follow {' or '.join(widths)} cannot be told.")
    return likely[0]


class InterpolatedGraph:
    """``graph`` at any ``widths``; ``other`` is the same at ``changed`` ones, each changed by a ratio of its own.

    Raises `ModelError` for graphs that differ in more than widths.
    """

    def __init__(self, graph: onnx.ModelProto, widths: Widths, other: onnx.ModelProto, changed: Widths) -> None:
        self._graph, other = _in_order(graph), _in_order(other)
        self._rules: dict[FieldPath, LinearRule] = {}
        self._values: dict[FieldPath, dict[int, LinearRule]] = {}
        self._resized: list[FieldPath] = []
        self._marked: set[FieldPath] = set()
        for path, one, two in _differences(self._graph, other, ()):
            if isinstance(one, int):
                self._rules[path] = fit_rule(one, two, widths, changed)
            elif list(one.dims) != list(two.dims):
                self._resized.append(path)
                if one.HasField("data_location") or two.HasField("data_location"):
                    self._marked.add(path)
            else:
                self._values[path] = {
                    place: fit_rule(a, b, widths, changed)
                    for place, (a, b) in enumerate(zip(_numbers(one), _numbers(two), strict=True))
                    if a != b
                }
        truncate_weights(self._graph)
        for place, tensor in enumerate(self._graph.graph.initializer):
            where: FieldPath = (("graph", None), ("initializer", place))
            if tensor.HasField("raw_data") and where not in self._resized:
                self._resized.append(where)
        self._sizes: dict[tuple[tuple[str, int], ...], int] = {}

    def at(self, widths: Widths) -> onnx.ModelProto:
        """The graph at those widths, filled with weights of the first one over and over. Raises `ModelError`."""
        made = onnx.ModelProto()
        made.CopyFrom(self._graph)
        for path, rule in self._rules.items():
            _put(made, path, rule.at(widths))
        for path, rules in self._values.items():
            tensor = _at(made, path)
            values = _numbers(tensor)
            for place, rule in rules.items():
                values[place] = rule.at(widths)
            tensor.raw_data = np.array(values, helper.tensor_dtype_to_np_dtype(tensor.data_type)).tobytes()
        for path in self._resized:
            tensor = _at(made, path)
            size, marked = _stored_bytes(tensor), path in self._marked
            _fill(tensor, size)
            if marked and size < _MARKED_FROM_BYTES:
                tensor.ClearField("data_location")
            elif marked:
                tensor.data_location = TensorProto.DEFAULT
        return made

    def size_bytes(self, widths: Widths) -> int:
        """Bytes of its file. Raises `ModelError`."""
        key = tuple(sorted(widths.items()))
        if key not in self._sizes:
            self._sizes[key] = self.at(widths).ByteSize()
        return self._sizes[key]


def truncate_weights(graph: onnx.ModelProto) -> None:
    """Leave of each stored tensor its beginning, in place: all that `InterpolatedGraph` needs, in a file that is small."""
    for tensor in graph.graph.initializer:
        if len(tensor.raw_data) > _KEPT_BYTES:
            tensor.raw_data = tensor.raw_data[:_KEPT_BYTES]


def _in_order(graph: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose stored tensors and recorded shapes are sorted by name: how they are written follows their sizes."""
    made = onnx.ModelProto()
    made.CopyFrom(graph)
    for named in (made.graph.initializer, made.graph.value_info):
        named.sort(key=lambda entry: entry.name)
    return made


def _differences(one: Any, other: Any, path: FieldPath) -> Iterator[tuple[FieldPath, Any, Any]]:
    """Whole numbers that differ, and stored tensors whose sizes or few whole numbers do, with their places."""
    fields, others = _fields(one), _fields(other)
    if [field.name for field, _ in fields] != [field.name for field, _ in others]:
        raise ModelError("The graphs differ in more than widths.")
    if isinstance(one, TensorProto) and _differ(one, other):
        yield path, one, other
    for (field, value), (_, again) in zip(fields, others, strict=True):
        if isinstance(one, TensorProto) and field.name.endswith("_data"):
            continue
        repeated = not isinstance(value, str | bytes | int | float) and hasattr(value, "__len__")
        if repeated and len(value) != len(again):
            raise ModelError(f"The graphs differ in how many there are of {field.name}.")
        pairs = zip(range(len(value)), value, again, strict=True) if repeated else [(None, value, again)]
        for place, left, right in pairs:
            step = (*path, (field.name, place))
            if hasattr(left, "ListFields"):
                yield from _differences(left, right, step)
            elif isinstance(left, int):
                if left != right:
                    yield step, left, right
            elif not isinstance(left, float) and left != right:
                raise ModelError(f"The graphs differ in {field.name}.")


def _fields(message: Any) -> list[tuple[Any, Any]]:
    """Those that are set, but for the mark of a stored tensor, which follows its size."""
    return [(field, value) for field, value in message.ListFields() if field.name != "data_location"]


def _differ(one: TensorProto, other: TensorProto) -> bool:
    if list(one.dims) != list(other.dims):
        return True
    return one.data_type in _SHAPES and math.prod(one.dims) <= _FEW and one.raw_data != other.raw_data


def _numbers(tensor: TensorProto) -> list[int]:
    values: list[int] = np.frombuffer(tensor.raw_data, helper.tensor_dtype_to_np_dtype(tensor.data_type)).tolist()
    return values


def _stored_bytes(tensor: TensorProto) -> int:
    """Of its elements; those of 4 bits are packed in pairs."""
    count = int(math.prod(tensor.dims))
    if tensor.data_type in (TensorProto.INT4, TensorProto.UINT4):
        return (count + 1) // 2
    return count * int(np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type)).itemsize)


def _fill(tensor: TensorProto, size: int) -> None:
    """Give a tensor the values that it has, over and over, up to ``size`` bytes, in place."""
    if tensor.HasField("raw_data"):
        content = tensor.raw_data or bytes(1)
        tensor.raw_data = (content * (size // len(content) + 1))[:size]
        return
    for values in (tensor.int32_data, tensor.int64_data, tensor.float_data):
        if values:
            kept = np.resize(np.array(values), math.prod(tensor.dims)).tolist()
            del values[:]
            values.extend(kept)


def _at(message: Any, path: FieldPath) -> Any:
    for name, place in path:
        message = getattr(message, name) if place is None else getattr(message, name)[place]
    return message


def _put(message: Any, path: FieldPath, value: int) -> None:
    *above, (name, place) = path
    parent = _at(message, tuple(above))
    if place is None:
        setattr(parent, name, value)
    else:
        getattr(parent, name)[place] = value
