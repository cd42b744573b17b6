"""LiteRT files in bundles: one row at once, by the shortest of several graphs that holds it."""

from __future__ import annotations

from pathlib import Path

from compress.formats.runtime import Session, TensorType
from compress.plugins.apps.bundled_format import Axis, BundledFormat, Interface, Signature

_LENGTH = "sequence_length"


def _interface(file: Path, session: Session | None) -> Interface:
    """One row; its length is a name where there are several."""
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
"""Through LiteRT's interpreter on this machine's processor; its package has the schema, too."""
