"""As JUnit test cases, one for each judgement."""

from __future__ import annotations

from compress.compare.gate import GateResult, Judgement
from compress.compare.words import judged_name, judgement_text, side_text
from compress.report.junit import Case, Suite, junit_xml


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
