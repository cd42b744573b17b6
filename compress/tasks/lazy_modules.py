"""Modules that tasks use and that are imported at their first use, so that the registry of tasks loads quickly.

`from compress.tasks.lazy_modules import np` imports no NumPy: the access to an attribute such as `np.zeros` does.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

__all__ = ["calibration", "losses", "np", "pa", "retrieval", "statistics", "token_metrics", "torch"]


class _LazyModule(ModuleType):
    """Stand-in for the module of its name."""

    def __getattr__(self, name: str) -> object:
        return getattr(import_module(self.__name__), name)


if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    import torch

    from compress.numerics import calibration, losses, statistics, token_metrics
    from compress.numerics import embeddings as retrieval
else:
    np, pa, torch = _LazyModule("numpy"), _LazyModule("pyarrow"), _LazyModule("torch")
    calibration, losses = _LazyModule("compress.numerics.calibration"), _LazyModule("compress.numerics.losses")
    statistics, retrieval = _LazyModule("compress.numerics.statistics"), _LazyModule("compress.numerics.embeddings")
    token_metrics = _LazyModule("compress.numerics.token_metrics")
