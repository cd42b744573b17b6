"""What a bundle asks of a model in any format: its inputs and outputs, and what it holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from compress.formats.runtime import Session, TensorType, get_runtime, why_unavailable
from compress.formats.targets import TARGETS
from compress.inspection.tensors import read_model
from compress.plugins import UnusablePluginError, find_extensions, load_extension
from compress.plugins.apps.app_type import Kind
from compress.plugins.apps.bundled_format import Axis, BundledFormat, Contents, Interface, Signature
from compress.plugins.apps.manifest import TensorRecord
from compress.utils.errors import InputError, ModelError

_INTEGERS = ("int8", "uint8", "int4", "uint4", "int2")


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


def bundled(form: str) -> BundledFormat:
    """Return how bundles read files of a format. Raises `InputError` for a format that no app runs."""
    extension = find_extensions("bundled_formats").get(form)
    found = None if extension is None else load_extension(extension, _accept)
    if found is None:
        raise InputError(f"No app runs files of the format {form}.", expected="a bundle of another format")
    return found


def _accept(value: object) -> BundledFormat:
    if not isinstance(value, BundledFormat):
        raise UnusablePluginError(f"it is a {type(value).__name__}; expected a BundledFormat")
    return value


def open_model(form: BundledFormat, file: Path) -> Session:
    """The model through its runtime on this machine. Raises `ModelError` where that can't open it."""
    target = TARGETS[form.target]
    return get_runtime(target.runtime).open(file, target, 1)


def unread_reason(form: BundledFormat) -> str | None:
    """Why files can't be looked into on this machine, or None where they can."""
    return why_unavailable(TARGETS[form.target]) if form.unread_reason is None else form.unread_reason()


def minimum_version(form: BundledFormat, file: Path) -> str:
    """The oldest version of the app's runtime that is known to open it."""
    if form.minimum_version is not None:
        return form.minimum_version(file)
    return get_runtime(TARGETS[form.target].runtime).build()


def contents(form: BundledFormat, file: Path) -> Contents:
    """Return the contents of a file. Raises `ModelError` for a broken file."""
    if form.contents is not None:
        return form.contents(file)
    tensors = read_model(file).tensors
    integers = any(one.dtype in _INTEGERS and len(one.shape) > 1 for one in tensors)
    return Contents({}, integers, {one.name: (one.dtype, one.shape, one.bytes) for one in tensors})


def shape_of(interface: Interface, kind: Kind, where: str) -> Shape:
    """Return inputs and outputs as in a manifest. Raises `ModelError` for those that no model of this app type has."""
    inputs, outputs = interface.inputs, interface.outputs
    names = inputs.keys() | outputs.keys()
    if any(kind.meaning(name) is None for name in names) or kind.required - names:
        optional = sorted(kind.meanings.keys() - kind.required)
        perhaps = f", perhaps {', '.join(optional)}" if optional else ""
        raise ModelError(
            f"The model takes {', '.join(inputs)} and gives {', '.join(outputs)}.",
            where=where,
            expected=f"{', '.join(sorted(kind.required))}{perhaps}: those of {kind.name}",
            hint="write it with the stage of `compress` for its format",
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
