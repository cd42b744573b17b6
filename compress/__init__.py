"""Compress a trained model into the smallest, fastest artifact that still does its job, and prove it."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress.api import CompressError, Recipe, check, evaluate, load, run, search

__all__ = ["CompressError", "Recipe", "check", "evaluate", "load", "run", "search"]

__version__ = "0.1.0"
DISTRIBUTION = "compress-models"
"""Name on a package index. Another project is called `compress` there and has a package of the same name."""

# No library used here may tell its makers anything, nor write down an id for this machine. Each looks when it is first
# imported, so that this comes before any: ONNX Runtime (and its genai), huggingface_hub, MLflow, Ray, and OpenVINO with
# NNCF, which do without the package that they would tell it with.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# transformers would fetch kernels from the Hub, which are code, and from 5.25 on refuses models without them.
os.environ.setdefault("USE_HUB_KERNELS", "0")
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]


def __getattr__(name: str) -> Any:
    """Return a name of the Python API, which is imported at its first use."""
    # A submodule of that name is imported by the import system, which asks here first.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module("compress.api"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
