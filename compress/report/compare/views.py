"""Views of a comparison and of a gate, for readers and for build servers."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import RenderableType

from compress.report.compare.change import Comparison
from compress.report.compare.console import console_comparison, console_gate
from compress.report.compare.formatting import gate_sentence, judged_name, judgement_text, side_text
from compress.report.compare.gate import GateResult, Judgement
from compress.report.compare.pages import html_comparison, html_gate, markdown_comparison, markdown_gate
from compress.report.junit import JunitCase, JunitSuite, junit_xml


def comparison_view(comparison: Comparison, name: str) -> RenderableType:
    """Return text, or an object that the console renders."""
    views = {"console": console_comparison, "markdown": markdown_comparison, "html": html_comparison}
    return comparison.model_dump_json(indent=2) if name == "json" else views[name](comparison)


def gate_view(result: GateResult, name: str) -> RenderableType:
    """Return a view of a gate as text, or an object that the console renders."""
    views: dict[str, Callable[[GateResult], RenderableType]] = {
        "console": console_gate, "markdown": markdown_gate, "html": html_gate,
        "junit": junit_gate, "github": github_gate,
    }  # fmt: skip
    return result.to_json() if name == "json" else views[name](result)


_LEVELS = {"failed": "error", "warned": "warning"}


def github_gate(result: GateResult) -> str:
    """Return `::error` for each failure, `::warning` for each inconclusive metric, and one `::notice`."""
    lines = [
        _command(_LEVELS[judgement.status], f"compress gate: {judged_name(judgement)}", judgement_text(judgement))
        for judgement in result.judgements
        if judgement.status in _LEVELS
    ]
    return "\n".join([*lines, _command("notice", "compress gate", gate_sentence(result))]) + "\n"


def _command(level: str, title: str, message: str) -> str:
    return f"::{level} title={escape_property(title)}::{escape_data(message)}"


def escape_data(text: str) -> str:
    """Escape a message like `escapeData` of the workflow toolkit."""
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def escape_property(text: str) -> str:
    """Escape a property like `escapeProperty` of the workflow toolkit."""
    return escape_data(text).replace(":", "%3A").replace(",", "%2C")


def junit_gate(result: GateResult) -> str:
    """Return JUnit XML, in which inconclusive metrics are skipped cases with a reason."""
    sides = {name: side_text(getattr(result.comparison, name)) for name in ("baseline", "candidate")}
    suite = JunitSuite("compress gate", [_case(judgement) for judgement in result.judgements], properties=sides)
    return junit_xml("compress gate", [suite])


def _case(judgement: Judgement) -> JunitCase:
    name = f"{judged_name(judgement)} no more than {judgement.margin} worse"
    names, text = (f"gate.{judgement.target}", name), judgement_text(judgement)
    match judgement.status:
        case "failed":
            return JunitCase(*names, "failure", text, text, "regression")
        case "warned":
            return JunitCase(*names, "skipped", message=text)
        case _:
            return JunitCase(*names, "passed", text)
