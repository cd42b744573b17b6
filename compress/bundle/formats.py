"""The formats that a bundle's model may have."""

from __future__ import annotations

from collections.abc import Mapping

from compress.bundle.format import BundledFormat
from compress.bundle.onnx import ONNX
from compress.models.model_file import Format

FORMATS: Mapping[Format, BundledFormat] = {"onnx": ONNX, "ort": ONNX}
