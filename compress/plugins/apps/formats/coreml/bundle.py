"""Core ML packages in bundles. They are inspected on any machine and run on macOS."""

from __future__ import annotations

from pathlib import Path

from compress.formats.coreml.model import MilProgram, read_coreml, specification_of, weights_of
from compress.formats.runtime import Session, TensorType, why_missing
from compress.plugins.apps.bundled_format import Axis, BundledFormat, Interface

_FREE = "sequence_length"
_IOS = {5: "15.0", 6: "15.0", 7: "16.0", 8: "17.0", 9: "18.0"}
"""First iOS version for each version of the specification, after coremltools' table of deployment targets."""


def _interface(file: Path, session: Session | None) -> Interface:
    """Return the inputs and outputs that the package states."""
    program = _read(file)
    inputs, axes = {}, {}
    for name, bounds in program.inputs.items():
        shape: list[int | str] = [low if low == high else _FREE for low, high in bounds]
        inputs[name] = TensorType(program.types[name], tuple(shape))
        for low, high in bounds:
            if low != high:
                axes[_FREE] = Axis(least=low, most=high)
    outputs = {
        # The only output size that depends on the input is the number of rows.
        name: TensorType(program.types[name], tuple(1 if size is None else size for size in shape))
        for name, shape in program.outputs.items()
    }
    return Interface(inputs, outputs, axes)


def _minimum_version(file: Path) -> str:
    """Return the oldest iOS version that opens the package."""
    version = _read(file).version
    return _IOS.get(version, f"that reads version {version} of the specification")


def _read(package: Path) -> MilProgram:
    specification = specification_of(package)
    return read_coreml(specification.read_bytes(), weights_of(specification).read_bytes(), package)


BUNDLE = BundledFormat(
    target="coreml",
    examples="compress.plugins.apps.formats.coreml",
    interface=_interface,
    unread_reason=lambda: why_missing("coremltools", "coremltools", "coreml"),
    minimum_version=_minimum_version,
)
"""Core ML framework of macOS."""
