"""Differences between two models: their files and recipes, their weights and their answers."""

from __future__ import annotations

from compress.plugins import Command, PluginSpec

SPEC = PluginSpec(
    name="diff",
    summary="Compare two models: files and recipe, every tensor, answers.",
    commands={
        "diff": Command(
            "compress.plugins.diff.cli:diff",
            "Show what differs between two models: files and recipe, every tensor, answers; and what to look at first.",
            "compress diff quickstart other-run --format html > diff.html",
            "Compare",
            isolation="run",
        ),
    },
)
