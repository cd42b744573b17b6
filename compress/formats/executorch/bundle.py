"""ExecuTorch programs in bundles: inputs have no names but an order, and free axes have bounds."""

from __future__ import annotations

from pathlib import Path

from compress.bundle.format import Contents, Interface, contents_of
from compress.bundle.manifest import Axis
from compress.formats.runtimes import get_runtime, why_unavailable
from compress.runtimes.runtime import Session, TensorType
from compress.targets import TARGETS, Target


class _ExecuTorch:
    """Through ExecuTorch's own runtime on this machine's processor."""

    target: Target = TARGETS["executorch"]
    templates = "executorch"

    def why_unread(self) -> str | None:
        """The package is not installed: it has the schema, too."""
        return why_unavailable(self.target)

    def interface(self, file: Path, session: Session | None) -> Interface:
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

    def contents(self, file: Path) -> Contents:
        """See `BundledFormat`."""
        return contents_of(file)

    def minimum_version(self, file: Path) -> str:
        """The one that is here."""
        return get_runtime(self.target.runtime).build()


EXECUTORCH = _ExecuTorch()
