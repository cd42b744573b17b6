"""Interpolation of a graph between widths: its file size at other widths, from two graphs that differ in nothing else.

Every integer that differs between the two graphs must follow one of the widths:
`number = factor x width + offset`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from compress.utils.errors import ModelError

Widths = Mapping[str, int]
"""Size of each kind of dimension: heads of a layer, neurons, tokens."""
FieldPath = tuple[tuple[str, int | None], ...]
"""Fields from the root of a message, each with its index if it is repeated."""
_SHAPES = (TensorProto.INT64, TensorProto.INT32)
_FEW = 64
"""Number of values up to which a stored integer tensor is read as sizes."""
_LARGEST_FACTOR = 1 << 20
_KEPT_BYTES = 4096
"""Bytes of each stored tensor that are retained to fill it with."""
_MARKED_FROM_BYTES = 1024
"""Size from which ONNX stores tensors externally and leaves a mark when it loads them."""


@dataclass(frozen=True)
class LinearRule:
    """A linear function of one width: ``factor`` x width + ``offset``."""

    width: str
    factor: Fraction
    offset: Fraction

    def at(self, widths: Widths) -> int:
        """Return the number at other widths. Raises `ModelError` if it is no natural number."""
        number = self.factor * widths[self.width] + self.offset
        if number.denominator != 1 or number < 0:
            raise ModelError(f"A width of {widths[self.width]} {self.width} gives a size of {number}.")
        return int(number)


def fit_rule(first: int, second: int, widths: Widths, changed: Widths) -> LinearRule:
    """Return how a number follows a width, from its values at two sets of widths.

    A multiple of a width takes precedence.

    Args:
        first: The number at ``widths``.
        second: The number at ``changed``.
        widths: The first widths.
        changed: The second widths.

    Returns:
        The rule.

    Raises:
        ModelError: No rule fits, or several do.
    """
    rules = []
    for name, width in widths.items():
        step = changed[name] - width
        if step:
            factor = Fraction(second - first, step)
            rules.append(LinearRule(name, factor, first - factor * width))
    # An exact multiple of a width is more plausible than one with an offset.
    multiples = [rule for rule in rules if rule.offset == 0]
    likely = multiples or [rule for rule in rules if rule.factor.denominator == 1 and rule.factor <= _LARGEST_FACTOR]
    if len(likely) != 1:
        raise ModelError(f"Whether {first} and {second} follow {' or '.join(widths)} is ambiguous.")
    return likely[0]


class InterpolatedGraph:
    """``graph`` at any widths; ``other`` is the same graph at ``changed`` widths, each changed by a different ratio.

    Raises `ModelError` for graphs that differ in more than widths.
    """

    def __init__(self, graph: onnx.ModelProto, widths: Widths, other: onnx.ModelProto, changed: Widths) -> None:
        self._graph, other = _in_order(graph), _in_order(other)
        self._rules: dict[FieldPath, LinearRule] = {}
        self._values: dict[FieldPath, dict[int, LinearRule]] = {}
        self._resized: list[FieldPath] = []
        self._marked: set[FieldPath] = set()
        for path, left, right in _differences(self._graph, other, ()):
            # An integer field, such as an attribute or an axis of a recorded shape.
            if isinstance(left, int):
                self._rules[path] = fit_rule(left, right, widths, changed)
            # A stored tensor of another size is filled with repeated values.
            elif list(left.dims) != list(right.dims):
                self._resized.append(path)
                if left.HasField("data_location") or right.HasField("data_location"):
                    self._marked.add(path)
            else:
                # A small integer tensor holds sizes, such as the target of a reshape.
                self._values[path] = {
                    index: fit_rule(a, b, widths, changed)
                    for index, (a, b) in enumerate(zip(_numbers(left), _numbers(right), strict=True))
                    if a != b
                }
        truncate_weights(self._graph)
        for index, tensor in enumerate(self._graph.graph.initializer):
            where: FieldPath = (("graph", None), ("initializer", index))
            if tensor.HasField("raw_data") and where not in self._resized:
                self._resized.append(where)
        self._sizes: dict[tuple[tuple[str, int], ...], int] = {}

    def at(self, widths: Widths) -> onnx.ModelProto:
        """Return the graph at other widths, filled with repeated weights of the first one. Raises `ModelError`."""
        resized = deepcopy(self._graph)
        for path, rule in self._rules.items():
            *above, (name, index) = path
            parent = _at(resized, above)
            if index is None:
                setattr(parent, name, rule.at(widths))
            else:
                getattr(parent, name)[index] = rule.at(widths)
        for path, rules in self._values.items():
            tensor = _at(resized, path)
            values = _numbers(tensor)
            for position, rule in rules.items():
                values[position] = rule.at(widths)
            tensor.raw_data = np.array(values, helper.tensor_dtype_to_np_dtype(tensor.data_type)).tobytes()
        for path in self._resized:
            tensor = _at(resized, path)
            size, marked = _stored_bytes(tensor), path in self._marked
            _fill(tensor, size)
            # ONNX marks only tensors that were large enough to be stored externally.
            if marked and size < _MARKED_FROM_BYTES:
                tensor.ClearField("data_location")
            elif marked:
                tensor.data_location = TensorProto.DEFAULT
        return resized

    def size_bytes(self, widths: Widths) -> int:
        """Return the size of the graph's file in bytes. Raises `ModelError`."""
        key = tuple(sorted(widths.items()))
        if key not in self._sizes:
            self._sizes[key] = self.at(widths).ByteSize()
        return self._sizes[key]


def truncate_weights(graph: onnx.ModelProto) -> None:
    """Keep only the beginning of each stored tensor, in place: all that `InterpolatedGraph` needs."""
    for tensor in graph.graph.initializer:
        if len(tensor.raw_data) > _KEPT_BYTES:
            tensor.raw_data = tensor.raw_data[:_KEPT_BYTES]


def _in_order(graph: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy with stored tensors and recorded shapes sorted by name, since exporters order them by size."""
    ordered = deepcopy(graph)
    for named in (ordered.graph.initializer, ordered.graph.value_info):
        named.sort(key=lambda entry: entry.name)
    return ordered


def _differences(left_message: object, right_message: object, path: FieldPath) -> Iterator[tuple[FieldPath, Any, Any]]:
    """Yield integers that differ, and stored tensors whose sizes or few integers differ, with their paths."""
    fields, others = _fields(left_message), _fields(right_message)
    if [field.name for field, _ in fields] != [field.name for field, _ in others]:
        raise ModelError("The graphs differ in more than widths.")
    if isinstance(left_message, TensorProto) and _differ(left_message, right_message):
        yield path, left_message, right_message
    for (field, value), (_, other_value) in zip(fields, others, strict=True):
        # Values of tensors are not compared, except small integer ones, which `_differ` reports.
        if isinstance(left_message, TensorProto) and field.name.endswith("_data"):
            continue
        repeated = not isinstance(value, str | bytes | int | float) and hasattr(value, "__len__")
        if repeated and len(value) != len(other_value):
            raise ModelError(f"The graphs differ in how many there are of {field.name}.")
        pairs = zip(range(len(value)), value, other_value, strict=True) if repeated else [(None, value, other_value)]
        for index, left, right in pairs:
            field_path = (*path, (field.name, index))
            if hasattr(left, "ListFields"):
                yield from _differences(left, right, field_path)
            elif left != right and isinstance(left, int):
                yield field_path, left, right
            # Floats may differ.
            elif left != right and not isinstance(left, float):
                raise ModelError(f"The graphs differ in {field.name}.")


def _differ(tensor: TensorProto, other_tensor: TensorProto) -> bool:
    """Return whether two stored tensors differ in shape, or in values that are read as sizes."""
    few_integers = tensor.data_type in _SHAPES and math.prod(tensor.dims) <= _FEW
    other_values = few_integers and tensor.raw_data != other_tensor.raw_data
    return other_values or list(tensor.dims) != list(other_tensor.dims)


def _fields(message: Any) -> list[tuple[Any, Any]]:
    """Return the fields that are set, except the mark of external data, which follows a tensor's size."""
    return [(field, value) for field, value in message.ListFields() if field.name != "data_location"]


def _numbers(tensor: TensorProto) -> list[int]:
    """Return the values of a stored tensor."""
    values: list[int] = np.frombuffer(tensor.raw_data, helper.tensor_dtype_to_np_dtype(tensor.data_type)).tolist()
    return values


def _stored_bytes(tensor: TensorProto) -> int:
    """Return the bytes of a tensor's elements; those of 4 bits are packed in pairs."""
    count = int(math.prod(tensor.dims))
    # Two values share a byte.
    if tensor.data_type in (TensorProto.INT4, TensorProto.UINT4):
        return (count + 1) // 2
    return count * int(np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type)).itemsize)


def _fill(tensor: TensorProto, size: int) -> None:
    """Repeat the values of a tensor up to ``size`` bytes, in place."""
    if tensor.HasField("raw_data"):
        content = tensor.raw_data or bytes(1)
        tensor.raw_data = (content * (size // len(content) + 1))[:size]
        return
    for values in (tensor.int32_data, tensor.int64_data, tensor.float_data):
        if values:
            repeated = np.resize(np.array(values), math.prod(tensor.dims)).tolist()
            del values[:]
            values.extend(repeated)


def _at(message: object, path: Sequence[tuple[str, int | None]]) -> Any:
    """Return the field at a path."""
    for name, index in path:
        message = getattr(message, name) if index is None else getattr(message, name)[index]
    return message
