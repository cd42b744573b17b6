"""A comparison, and what a gate made of it, for people and for build servers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.compare.change import Comparison
from compress.compare.gate import GateResult
from compress.compare.views.build_servers import github_gate, junit_gate
from compress.compare.views.console import console_comparison, console_gate
from compress.compare.views.html import html_comparison, html_gate
from compress.compare.views.markdown import markdown_comparison, markdown_gate

if TYPE_CHECKING:
    from rich.console import RenderableType


def comparison_view(comparison: Comparison, name: str) -> RenderableType:
    """A text, or for the console what it renders."""
    views = {"console": console_comparison, "markdown": markdown_comparison, "html": html_comparison}
    return comparison.model_dump_json(indent=2) if name == "json" else views[name](comparison)


def gate_view(result: GateResult, name: str) -> RenderableType:
    """The same of a gate."""
    views = {"console": console_gate, "markdown": markdown_gate, "html": html_gate}
    views |= {"json": GateResult.to_json, "junit": junit_gate, "github": github_gate}
    return views[name](result)
