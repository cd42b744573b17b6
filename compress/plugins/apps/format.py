"""Inspection of a model of any format: its inputs and outputs, operators and tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from compress.formats.runtime import Session, TensorType, get_runtime, why_unavailable
from compress.formats.targets import TARGETS
from compress.plugins import UnusablePluginError, find_extensions, load_extension
from compress.plugins.apps.app_type import AppType
from compress.plugins.apps.bundled_format import Axis, BundledFormat, Interface, Signature
from compress.plugins.apps.manifest import TensorRecord
from compress.utils.errors import InputError, ModelError


class InterfaceRecord(NamedTuple):
    """Interface of a model with the meaning of each tensor, as a manifest records it."""

    inputs: tuple[TensorRecord, ...]
    outputs: tuple[TensorRecord, ...]
    axes: Mapping[str, Axis]
    signatures: tuple[Signature, ...]

    @property
    def longest(self) -> int | None:
        """Largest number of tokens of an input, or None without a limit."""
        bounds = (
            self.axes[axis].most
            for entry in self.inputs
            if len(entry.shape) == 2
            for axis in entry.shape[1:]
            if isinstance(axis, str) and axis in self.axes
        )
        return min(bounds, default=None)


def find_bundled_format(form: str) -> BundledFormat:
    """Return the bundle support of a format.

    Raises:
        InputError: No application runs this format.
    """

    def accept(value: object) -> BundledFormat:
        if not isinstance(value, BundledFormat):
            raise UnusablePluginError(f"it is a {type(value).__name__}; expected a BundledFormat")
        return value

    extension = find_extensions("bundled_formats").get(form)
    bundled_format = None if extension is None else load_extension(extension, accept)
    if bundled_format is None:
        raise InputError(f"No app runs files of the format {form}.", expected="a bundle of another format")
    return bundled_format


def open_model(form: BundledFormat, file: Path) -> Session:
    """Open the model in its runtime on this machine. Raises `ModelError` if that fails."""
    target = TARGETS[form.target]
    return get_runtime(target.runtime).open(file, target, 1)


def unread_reason(form: BundledFormat) -> str | None:
    """Return the reason why files of the format cannot be inspected on this machine, or None."""
    return why_unavailable(TARGETS[form.target]) if form.unread_reason is None else form.unread_reason()


def minimum_version(form: BundledFormat, file: Path) -> str:
    """Return the oldest version of the app's runtime that can open the file."""
    if form.minimum_version is not None:
        return form.minimum_version(file)
    return get_runtime(TARGETS[form.target].runtime).build()


def record_interface(interface: Interface, kind: AppType, where: str) -> InterfaceRecord:
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
    return InterfaceRecord(_records(inputs, kind), _records(outputs, kind), interface.axes, interface.signatures)


def _records(types: Mapping[str, TensorType], kind: AppType) -> tuple[TensorRecord, ...]:
    return tuple(
        TensorRecord(
            name=name,
            dtype=tensor_type.dtype,
            shape=tuple("any" if axis is None else axis for axis in tensor_type.shape),
            meaning=kind.meaning(name) or "",
        )
        for name, tensor_type in types.items()
    )
