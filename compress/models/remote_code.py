"""Registry of the Python code outside this package that a recipe allows to run. Importing it imports no torch.

A process started by a run receives the registry of its parent process.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

MODULE_KEY = "compress_module"
"""Key in config.json with the function that builds the model; see `custom_module`."""
TIMM_NETWORK = "compress.models.timm_models:build"
"""Function that builds networks of timm; as a part of this package it is always allowed."""
_allowed: dict[str, Path] = {TIMM_NETWORK: Path()}


def allow(reference: str, folder: Path) -> None:
    """Allow modules built by ``reference``: `package.module:function`, or `file.py:function` in ``folder``.

    A model's own folder as reference allows the Python files in that folder.
    """
    _allowed[reference] = folder


def is_allowed(reference: str) -> bool:
    """Return True if a recipe of this process names the reference, or it is part of this package."""
    return reference in _allowed


def allowed_code() -> Mapping[str, Path]:
    """Return the allowed references and the folders of the recipes that name them."""
    return MappingProxyType(_allowed)
