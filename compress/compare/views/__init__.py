"""A comparison, and what a gate made of it, for people and for build servers."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import RenderableType

from compress.compare.change import Comparison
from compress.compare.gate import GateResult
from compress.compare.views.build_servers import github_gate, junit_gate
from compress.compare.views.console import console_comparison, console_gate
from compress.compare.views.pages import html_comparison, html_gate, markdown_comparison, markdown_gate


def comparison_view(comparison: Comparison, name: str) -> RenderableType:
    """A text, or for the console what it renders."""
    views = {"console": console_comparison, "markdown": markdown_comparison, "html": html_comparison}
    return comparison.model_dump_json(indent=2) if name == "json" else views[name](comparison)


def gate_view(result: GateResult, name: str) -> RenderableType:
    """The same of a gate."""
    views: dict[str, Callable[[GateResult], RenderableType]] = {
        "console": console_gate, "markdown": markdown_gate, "html": html_gate,
        "junit": junit_gate, "github": github_gate,
    }  # fmt: skip
    return result.to_json() if name == "json" else views[name](result)
