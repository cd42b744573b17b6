"""LiteRT files in bundles: one row at once, by the shortest of several graphs that holds it."""

from __future__ import annotations

from pathlib import Path

from compress.bundle.format import Contents, Interface, contents_of
from compress.bundle.manifest import Axis, Signature
from compress.formats.runtimes import get_runtime, why_unavailable
from compress.runtimes.runtime import Session, TensorType
from compress.targets import TARGETS, Target

_LENGTH = "sequence_length"


class _LiteRt:
    """Through LiteRT's interpreter on this machine's processor."""

    target: Target = TARGETS["litert"]
    templates = "litert"

    def why_unread(self) -> str | None:
        """The package is not installed: it has the schema, too."""
        return why_unavailable(self.target)

    def interface(self, file: Path, session: Session | None) -> Interface:
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

    def contents(self, file: Path) -> Contents:
        """See `BundledFormat`."""
        return contents_of(file)

    def minimum_version(self, file: Path) -> str:
        """The one that is here."""
        return get_runtime(self.target.runtime).build()


LITERT = _LiteRt()
