"""Nightly runs: a suite of recipes that runs unattended, is gated against baselines and watched over weeks."""

from __future__ import annotations

from compress.plugins import Command, PluginSpec

SPEC = PluginSpec(
    name="nightly",
    summary="Run a suite of recipes every night, gate it against baselines and look for drift.",
    requires=(
        "diff",
        "monitoring",
        "ray",
    ),
    commands={
        "nightly": Command(
            "compress.plugins.nightly.cli:nightly",
            "Run every recipe of a suite, gate it against its baseline, and look for drift in the history.",
            "compress nightly suite.yaml",
            "Operate",
        ),
    },
)
