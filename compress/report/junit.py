"""Test cases of JUnit, which build servers read; and the limits of a report as such."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple
from xml.etree import ElementTree

from compress.report.rows import environment_rows, limit_found
from compress.report.schema import LimitResult, Report

_FORBIDDEN = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


class Case(NamedTuple):
    """One test case. ``text`` is what was found, ``message`` the same in a line where it did not pass."""

    classname: str
    name: str
    state: Literal["passed", "failure", "error", "skipped"]
    text: str = ""
    message: str = ""
    kind: str | None = None
    seconds: float = 0.0


class Suite(NamedTuple):
    """Cases that belong together, with what else is known of them."""

    name: str
    cases: Sequence[Case]
    seconds: float = 0.0
    started: str | None = None
    properties: Mapping[str, str] = {}


def junit_xml(name: str, suites: Sequence[Suite], seconds: float = 0.0) -> str:
    """The document. What XML cannot hold is replaced."""
    root = ElementTree.Element("testsuites", _counts(name, seconds, [case for suite in suites for case in suite.cases]))
    for suite in suites:
        counts = _counts(suite.name, suite.seconds, suite.cases)
        if suite.started:
            counts["timestamp"] = _plain(suite.started)
        element = ElementTree.SubElement(root, "testsuite", counts)
        if suite.properties:
            properties = ElementTree.SubElement(element, "properties")
            for key, value in suite.properties.items():
                ElementTree.SubElement(properties, "property", {"name": _plain(key), "value": _plain(value)})
        for case in suite.cases:
            names = {"classname": _plain(case.classname), "name": _plain(case.name), "time": f"{case.seconds:.3f}"}
            found = ElementTree.SubElement(element, "testcase", names)
            if case.state != "passed":
                attributes = {"message": _plain(case.message)} | ({"type": case.kind} if case.kind else {})
                ElementTree.SubElement(found, case.state, attributes).text = _plain(case.text) or None
            elif case.text:
                ElementTree.SubElement(found, "system-out").text = _plain(case.text)
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _counts(name: str, seconds: float, cases: Sequence[Case]) -> dict[str, str]:
    states = [case.state for case in cases]
    counts = {"tests": len(cases), "failures": states.count("failure"), "errors": states.count("error")}
    known = {key: str(count) for key, count in {**counts, "skipped": states.count("skipped")}.items()}
    return {**known, "time": f"{seconds:.3f}", "name": _plain(name)}


def _plain(value: str) -> str:
    """Without the control characters that XML cannot hold."""
    return _FORBIDDEN.sub("\ufffd", value)


def junit_report(report: Report) -> str:
    """One test suite, one case a limit: missed ones fail, those that were not judged or can't be told are skipped."""
    cases = [_case(report, limit) for limit in report.limits]
    seconds, properties = report.seconds or 0.0, dict(environment_rows(report.environment))
    return junit_xml(report.recipe, [Suite(report.recipe, cases, seconds, report.started, properties)], seconds)


def _case(report: Report, limit: LimitResult) -> Case:
    names, found = (f"{report.recipe}.{limit.target}", f"{limit.metric} {limit.limit}"), limit_found(report, limit)
    if limit.skipped:
        return Case(*names, "skipped", message=limit.reason or "the target was skipped")
    if limit.unknown:
        return Case(*names, "skipped", message=f"{limit.verdict}: {found}")
    if not limit.passed:
        text = f"{limit.metric} on {limit.target}: wanted {limit.limit}, found {found}"
        return Case(*names, "failure", text, f"found {found}", "limit missed")
    return Case(*names, "passed", found)
