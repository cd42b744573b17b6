"""The formats that a bundle's model may have."""

from __future__ import annotations

from collections.abc import Mapping

from compress.bundle.coreml import COREML
from compress.bundle.executorch import EXECUTORCH
from compress.bundle.format import BundledFormat
from compress.bundle.litert import LITERT
from compress.bundle.onnx import ONNX
from compress.formats.model_file import Format

FORMATS: Mapping[Format, BundledFormat] = {
    "onnx": ONNX,
    "ort": ONNX,
    "litert": LITERT,
    "executorch": EXECUTORCH,
    "coreml": COREML,
}
