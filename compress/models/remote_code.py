"""The code beside this package's own that a recipe lets run. Importing this imports no torch.

A process that a run starts is given what its own process was told.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

MODULE_KEY = "compress_module"
"""What a config.json says under this key makes the model: see `plain_module`."""
TIMM_NETWORK = "compress.models.timm_models:build"
"""What makes a network of timm: code of this package, which every config may name."""
_allowed: dict[str, Path] = {TIMM_NETWORK: Path()}


def allow(reference: str, folder: Path) -> None:
    """Let modules be made by ``reference``, `package.module:function`, or `file.py:function` in ``folder``.

    A model's own folder as reference lets the Python files in it run.
    """
    _allowed[reference] = folder


def is_allowed(reference: str) -> bool:
    """Whether a recipe of this process names it, or it is this package's own."""
    return reference in _allowed


def allowed_code() -> Mapping[str, Path]:
    """The references that recipes of this process name, and the folders of these recipes."""
    return MappingProxyType(_allowed)
