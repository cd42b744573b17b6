"""LiteRT files in bundles. The shortest graph that fits computes one row at a time."""

from __future__ import annotations

from pathlib import Path

from compress.formats.runtime import Session, TensorType
from compress.plugins.apps.bundled_format import Axis, BundledFormat, Interface, Signature

_LENGTH = "sequence_length"


def _interface(file: Path, session: Session | None) -> Interface:
    """Return inputs and outputs of one row. The length is a named axis if the file has several graphs."""
    from compress.formats.litert.runtime import LiteRtSession

    assert isinstance(session, LiteRtSession)
    signatures = tuple(Signature(name=name, length=length) for name, length in session.signatures.items())
    longest = signatures[-1].length
    inputs = {
        name: TensorType(kind.dtype, (1, *(_LENGTH if axis is None else axis for axis in kind.shape[1:])))
        for name, kind in session.input_types.items()
    }
    outputs = {name: TensorType(kind.dtype, (1, *kind.shape[1:])) for name, kind in session.output_types.items()}
    axes = {_LENGTH: Axis(least=1, most=longest)} if longest is not None else {}
    return Interface(inputs, outputs, axes, signatures)


BUNDLE = BundledFormat(target="litert", examples="compress.plugins.apps.formats.litert", interface=_interface)
"""LiteRT interpreter on this machine's CPU. Its package also contains the schema."""
