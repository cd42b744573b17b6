"""ExecuTorch programs in bundles: inputs have no names but an order, and free axes have bounds."""

from __future__ import annotations

from pathlib import Path

from compress.formats.runtime import Session, TensorType
from compress.plugins.apps.bundled_format import Axis, BundledFormat, Interface


def _interface(file: Path, session: Session | None) -> Interface:
    """Names are those of the config beside it, bounds the program's own; an output has as many rows as an input."""
    from compress.formats.executorch.runtime import ExecuTorchSession

    assert isinstance(session, ExecuTorchSession)
    axes: dict[str, Axis] = {}
    for name, bounds in session.bounds.items():
        for axis, most in zip(session.input_types[name].shape, bounds, strict=True):
            if isinstance(axis, str):
                axes[axis] = Axis(least=None, most=most)
    rows = next(iter(session.input_types.values())).shape[0]
    outputs = {name: TensorType(kind.dtype, (rows, *kind.shape[1:])) for name, kind in session.output_types.items()}
    return Interface(session.input_types, outputs, axes)


BUNDLE = BundledFormat(target="executorch", examples="compress.plugins.apps.formats.executorch", interface=_interface)
"""Through ExecuTorch's own runtime on this machine's processor; its package has the schema, too."""
