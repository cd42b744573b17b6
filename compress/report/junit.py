"""JUnit XML for build servers: its test cases, and the limits of a report as such."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from compress.report.pages import render_text
from compress.report.rows import environment_rows, limit_result
from compress.results.report import LimitResult, Report

_FORBIDDEN = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


class JunitCase(NamedTuple):
    """Test case. ``text`` is the result, ``message`` a summary in one line if it did not pass."""

    classname: str
    name: str
    state: Literal["passed", "failure", "error", "skipped"]
    text: str = ""
    message: str = ""
    kind: str | None = None
    seconds: float = 0.0


class JunitSuite(NamedTuple):
    """Test cases that belong together, with their properties."""

    name: str
    cases: Sequence[JunitCase]
    seconds: float = 0.0
    started: str | None = None
    properties: Mapping[str, str] = {}


def junit_xml(name: str, suites: Sequence[JunitSuite], seconds: float = 0.0) -> str:
    """Return the XML document. Characters that XML cannot hold are replaced."""
    whole = JunitSuite(name, [case for suite in suites for case in suite.cases], seconds)
    text = render_text("report/templates/junit.xml", whole=whole, suites=suites, counts=_counts)
    return _FORBIDDEN.sub("\ufffd", text)


def _counts(suite: JunitSuite) -> dict[str, str]:
    states = [case.state for case in suite.cases]
    counts = {"tests": len(states), "failures": states.count("failure"), "errors": states.count("error")}
    attributes = {key: str(count) for key, count in {**counts, "skipped": states.count("skipped")}.items()}
    return {**attributes, "time": f"{suite.seconds:.3f}", "name": suite.name}


def junit_report(report: Report) -> str:
    """Return one test suite with a case for each limit.

    Missed limits fail. Limits that are skipped or inconclusive are skipped cases.
    """
    cases = [_case(report, limit) for limit in report.limits]
    seconds, properties = report.seconds or 0.0, dict(environment_rows(report.environment))
    return junit_xml(report.recipe, [JunitSuite(report.recipe, cases, seconds, report.started, properties)], seconds)


def _case(report: Report, limit: LimitResult) -> JunitCase:
    names, result = (f"{report.recipe}.{limit.target}", f"{limit.metric} {limit.limit}"), limit_result(report, limit)
    if limit.skipped:
        return JunitCase(*names, "skipped", message=limit.reason or "the target was skipped")
    if limit.unknown and not limit.missed:
        outcome = "inconclusive" if limit.verdict == "cannot tell" else limit.verdict
        return JunitCase(*names, "skipped", message=f"{outcome}: {result}")
    if not limit.passed:
        text = f"{limit.metric} on {limit.target}: wanted {limit.limit}, found {result}"
        return JunitCase(*names, "failure", text, f"found {result}", "limit missed")
    return JunitCase(*names, "passed", result)
