"""Execution of a recipe's stages on the machines of a Ray cluster."""

from __future__ import annotations

from compress.plugins import PluginSpec

SPEC = PluginSpec(
    name="ray",
    summary="Run stages on the machines of a Ray cluster.",
)
