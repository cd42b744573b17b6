"""ONNX Runtime's own tools for its format, without what importing them does to the process's log."""

from __future__ import annotations

import logging
from typing import Any


def ort_tools() -> Any:
    """`onnxruntime.tools.ort_format_model`, which also puts the flatbuffers schema `ort_flatbuffers_py` on the path.

    Importing it gives the root logger a handler, and it tells of each file that it writes.
    """
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        from onnxruntime.tools import ort_format_model
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
    logging.getLogger("ort_format_model.utils").setLevel(logging.WARNING)
    return ort_format_model
