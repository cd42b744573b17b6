"""Core ML packages in bundles: read by their own messages anywhere, run on a Mac."""

from __future__ import annotations

from pathlib import Path

from compress.bundle.format import Contents, Interface, contents_of
from compress.bundle.manifest import Axis
from compress.formats.coreml.file import MilProgram, read_coreml
from compress.formats.coreml.model import specification_of, weights_of
from compress.installation import has_package
from compress.runtimes.runtime import Session, TensorType
from compress.targets import TARGETS, Target

_FREE = "sequence_length"
_IOS = {5: "15.0", 6: "15.0", 7: "16.0", 8: "17.0", 9: "18.0"}
"""The first that opens a version of the specification, by coremltools' table of deployment targets."""


class _CoreMl:
    """Through the system's framework, on a Mac."""

    target: Target = TARGETS["coreml"]
    templates = "coreml"

    def why_unread(self) -> str | None:
        """The package with the messages is not installed."""
        installed = has_package("coremltools")
        return None if installed else "coremltools is not installed (pip install 'compress[coreml]')"

    def interface(self, file: Path, session: Session | None) -> Interface:
        """As the package tells it."""
        program = _read(file)
        inputs, axes = {}, {}
        for name, bounds in program.inputs.items():
            shape: list[int | str] = [low if low == high else _FREE for low, high in bounds]
            inputs[name] = TensorType(program.types[name], tuple(shape))
            for low, high in bounds:
                if low != high:
                    axes[_FREE] = Axis(least=low, most=high)
        outputs = {
            # What depends on the input is the number of rows.
            name: TensorType(program.types[name], tuple(1 if size is None else size for size in shape))
            for name, shape in program.outputs.items()
        }
        return Interface(inputs, outputs, axes)

    def contents(self, file: Path) -> Contents:
        """See `BundledFormat`."""
        return contents_of(specification_of(file))

    def minimum_version(self, file: Path) -> str:
        """Of iOS."""
        version = _read(file).version
        return _IOS.get(version, f"that reads version {version} of the specification")


COREML = _CoreMl()


def _read(package: Path) -> MilProgram:
    specification = specification_of(package)
    return read_coreml(specification.read_bytes(), weights_of(specification).read_bytes(), package)
