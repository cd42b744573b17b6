"""What a bundle knows of one format of models: the interface that `onnx` and its neighbours fulfil."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, Protocol

from compress.bundle.kind import Kind
from compress.bundle.manifest import Axis, Signature, TensorRecord
from compress.errors import ModelError
from compress.formats.runtimes import get_runtime
from compress.inspect.tensors import read_model
from compress.runtimes.runtime import Session, TensorType
from compress.targets import Target


class Interface(NamedTuple):
    """What a model takes and gives, in its own order; ``axes`` and ``signatures`` as a manifest has them."""

    inputs: Mapping[str, TensorType]
    outputs: Mapping[str, TensorType]
    axes: Mapping[str, Axis] = MappingProxyType({})
    signatures: tuple[Signature, ...] = ()


class Contents(NamedTuple):
    """Operator domains with their versions, whether products are of 8-bit integers, and bytes of what is stored.

    ``stored`` is name -> (numpy's type name, shape, bytes); ``few_bit_products``: whether some read weights so.
    """

    opsets: dict[str, int]
    integers: bool
    stored: dict[str, tuple[str, tuple[int, ...], int]]
    few_bit_products: bool = False


class BundledFormat(Protocol):
    """How a bundle looks into a model of one format, and runs it. One module each, registered in `formats`."""

    target: Target
    """Through which it answers on this machine."""
    templates: str
    """The folder below `examples` with the code that runs it: one `Model` in each language."""

    def why_unread(self) -> str | None:
        """Why files can't be looked into on this machine, or None where they can."""

    def interface(self, file: Path, session: Session | None) -> Interface:
        """What ``file`` takes and gives. A format that is read without its runtime needs no ``session``."""

    def contents(self, file: Path) -> Contents:
        """What it holds. Raises `ModelError` for a broken file."""

    def minimum_version(self, file: Path) -> str:
        """The oldest version of the app's runtime that is known to open it."""


class Shape(NamedTuple):
    """An `Interface` with what each tensor means, as a manifest has it."""

    inputs: tuple[TensorRecord, ...]
    outputs: tuple[TensorRecord, ...]
    axes: Mapping[str, Axis]
    signatures: tuple[Signature, ...]

    @property
    def longest(self) -> int | None:
        """The most tokens that an input takes, or None where there is no bound."""
        bounds = (
            self.axes[axis].most
            for entry in self.inputs
            if len(entry.shape) == 2
            for axis in entry.shape[1:]
            if isinstance(axis, str) and axis in self.axes
        )
        return min(bounds, default=None)


def open_model(form: BundledFormat, file: Path) -> Session:
    """The model through its runtime on this machine. Raises `ModelError` where that can't open it."""
    return get_runtime(form.target.runtime).open(file, form.target, 1)


def shape_of(interface: Interface, kind: Kind, where: str) -> Shape:
    """Its inputs and outputs. Raises `ModelError` for those that no model of that kind has."""
    inputs, outputs = interface.inputs, interface.outputs
    names = inputs.keys() | outputs.keys()
    if any(kind.meaning(name) is None for name in names) or kind.required - names:
        optional = sorted(kind.meanings.keys() - kind.required)
        perhaps = f", perhaps {', '.join(optional)}" if optional else ""
        raise ModelError(
            f"The model takes {', '.join(inputs)} and gives {', '.join(outputs)}.",
            where=where,
            expected=f"{', '.join(sorted(kind.required))}{perhaps}: those of {kind.name}",
            mend="write it with the stage of `compress` for its format",
        )
    return Shape(_records(inputs, kind), _records(outputs, kind), interface.axes, interface.signatures)


def _records(types: Mapping[str, TensorType], kind: Kind) -> tuple[TensorRecord, ...]:
    return tuple(
        TensorRecord(
            name=name,
            dtype=found.dtype,
            shape=tuple("any" if axis is None else axis for axis in found.shape),
            meaning=kind.meaning(name) or "",
        )
        for name, found in types.items()
    )


_INTEGERS = ("int8", "uint8", "int4", "uint4", "int2")


def contents_of(file: Path) -> Contents:
    """Of a format that has no operator domains. Raises `ModelError`."""
    tensors = read_model(file).tensors
    integers = any(one.dtype in _INTEGERS and len(one.shape) > 1 for one in tensors)
    return Contents({}, integers, {one.name: (one.dtype, one.shape, one.bytes) for one in tensors})
