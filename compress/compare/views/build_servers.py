"""A gate for build servers: as GitHub workflow commands, which show up as annotations, and as JUnit test cases."""

from __future__ import annotations

from compress.compare.gate import GateResult, Judgement
from compress.compare.words import gate_sentence, judged_name, judgement_text, side_text
from compress.report.junit import Case, Suite, junit_xml

_LEVELS = {"failed": "error", "warned": "warning"}


def github_gate(result: GateResult) -> str:
    """`::error` for each failure, `::warning` for what can't be told, and one `::notice` with the verdict."""
    lines = [
        _command(_LEVELS[judgement.status], f"compress gate: {judged_name(judgement)}", judgement_text(judgement))
        for judgement in result.judgements
        if judgement.status in _LEVELS
    ]
    return "\n".join([*lines, _command("notice", "compress gate", gate_sentence(result))]) + "\n"


def _command(level: str, title: str, message: str) -> str:
    return f"::{level} title={escape_property(title)}::{escape_data(message)}"


def escape_data(text: str) -> str:
    """As the workflow toolkit's own `escapeData`."""
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def escape_property(text: str) -> str:
    """As the workflow toolkit's own `escapeProperty`."""
    return escape_data(text).replace(":", "%3A").replace(",", "%2C")


def junit_gate(result: GateResult) -> str:
    """Failures fail; what can't be told is skipped with its reason, which build servers show in yellow."""
    sides = {name: side_text(getattr(result.comparison, name)) for name in ("baseline", "candidate")}
    suite = Suite("compress gate", [_case(judgement) for judgement in result.judgements], properties=sides)
    return junit_xml("compress gate", [suite])


def _case(judgement: Judgement) -> Case:
    name = f"{judged_name(judgement)} no more than {judgement.margin} worse"
    names, found = (f"gate.{judgement.target}", name), judgement_text(judgement)
    match judgement.status:
        case "failed":
            return Case(*names, "failure", found, found, "regression")
        case "warned":
            return Case(*names, "skipped", message=found)
        case _:
            return Case(*names, "passed", found)
