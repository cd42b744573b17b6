"""As JUnit test cases, one for each judgement."""

from __future__ import annotations

from xml.etree import ElementTree

from compress.compare.gate import GateResult, Judgement
from compress.compare.words import judged_name, judgement_text, side_text
from compress.report.junit import plain_xml


def junit_gate(result: GateResult) -> str:
    """Failures fail; what can't be told is skipped with its reason, which build servers show in yellow."""
    counts = {
        "tests": str(len(result.judgements)),
        "failures": str(len(result.having("failed"))),
        "skipped": str(len(result.having("warned"))),
    }
    whole = {**counts, "errors": "0", "time": "0.000", "name": "compress gate"}
    root = ElementTree.Element("testsuites", whole)
    suite = ElementTree.SubElement(root, "testsuite", whole)
    properties = ElementTree.SubElement(suite, "properties")
    for name in ("baseline", "candidate"):
        value = plain_xml(side_text(getattr(result.comparison, name)))
        ElementTree.SubElement(properties, "property", {"name": name, "value": value})
    for judgement in result.judgements:
        _case(suite, judgement)
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _case(suite: ElementTree.Element, judgement: Judgement) -> None:
    names = {
        "classname": f"gate.{judgement.target}",
        "name": f"{judged_name(judgement)} no more than {judgement.margin} worse",
        "time": "0",
    }
    case = ElementTree.SubElement(suite, "testcase", {key: plain_xml(value) for key, value in names.items()})
    found = plain_xml(judgement_text(judgement))
    if judgement.status == "failed":
        failure = ElementTree.SubElement(case, "failure", {"message": found, "type": "regression"})
        failure.text = found
    elif judgement.status == "warned":
        ElementTree.SubElement(case, "skipped", {"message": found})
    else:
        ElementTree.SubElement(case, "system-out").text = found
