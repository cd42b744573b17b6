"""Bundles of torch.export programs."""

from __future__ import annotations

from pathlib import Path

from compress.formats.runtime import Session
from compress.plugins.apps.bundled_format import BundledFormat, Interface
from compress_pt2.runtime import Pt2Session


def _interface(file: Path, session: Session | None) -> Interface:
    """Return the inputs and outputs declared by the program."""
    assert isinstance(session, Pt2Session)
    return Interface(session.input_types, session.output_types)


BUNDLE = BundledFormat(target="pt2", examples="compress_pt2", interface=_interface)
