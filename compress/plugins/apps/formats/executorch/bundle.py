"""ExecuTorch programs in bundles. Their inputs are positional, and dynamic axes have bounds."""

from __future__ import annotations

from pathlib import Path

from compress.formats.runtime import Session, TensorType
from compress.plugins.apps.bundled_format import Axis, BundledFormat, Interface


def _interface(file: Path, session: Session | None) -> Interface:
    """Return names from the config and bounds from the program. Outputs have as many rows as inputs."""
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
"""ExecuTorch runtime on this machine's CPU. Its package also contains the schema."""
