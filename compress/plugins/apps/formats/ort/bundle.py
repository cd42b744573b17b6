"""Graphs in ONNX Runtime's own format in bundles."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from compress.formats.ort.model import read_ort
from compress.plugins.apps.bundled_format import Contents
from compress.plugins.apps.formats.onnx.bundle import BUNDLE as ONNX
from compress.plugins.apps.formats.onnx.bundle import contents_of


def _contents(file: Path) -> Contents:
    """The graph is read without its versions."""
    return contents_of(read_ort(file.read_bytes(), file).as_onnx(), {})


BUNDLE = replace(ONNX, contents=_contents)
