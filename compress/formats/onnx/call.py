"""One node of an ONNX graph with the tensors of one call, and what it is counted in."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import onnx_ir as ir


class Tensor(NamedTuple):
    """Type and shape of a tensor; ``stored`` if the graph holds its values."""

    dtype: ir.DataType
    shape: tuple[int, ...]
    stored: bool = False

    @property
    def elements(self) -> int:
        """Number of values; 1 for a scalar."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Size of the values; 4-bit types are packed in pairs."""
        return math.ceil(self.elements * float(self.dtype.bitwidth) / 8)


class Operations(NamedTuple):
    """Arithmetic operations by the class of arithmetic that does them."""

    fp32: int = 0
    int8: int = 0


@dataclass(frozen=True)
class Call:
    """One node with the tensors of one call. Inputs that the node leaves out are ``None``."""

    node: ir.Node
    inputs: list[Tensor | None]
    outputs: list[Tensor]

    def tensor(self, index: int) -> Tensor | None:
        """An input, or ``None`` where it is left out."""
        return self.inputs[index] if index < len(self.inputs) else None

    def need(self, index: int) -> Tensor:
        """An input that the operator always has."""
        tensor = self.tensor(index)
        assert tensor is not None, f"{self.node.op_type} without input {index}"
        return tensor

    def has(self, index: int) -> bool:
        """Whether the node has that input."""
        return self.tensor(index) is not None

    def integer(self, name: str, default: int) -> int:
        """An integer attribute."""
        found = self.node.attributes.get(name)
        return default if found is None else found.as_int()

    def integers(self, name: str) -> tuple[int, ...]:
        """A list of integers, empty where it is left out."""
        found = self.node.attributes.get(name)
        return () if found is None else tuple(found.as_ints())

    @property
    def out(self) -> Tensor:
        """The first output."""
        return self.outputs[0]
