"""Test cases of JUnit, which build servers read; and the limits of a report as such."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from compress.report.pages import render_text
from compress.report.rows import environment_rows, limit_found
from compress.results.report import LimitResult, Report

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
    whole = Suite(name, [case for suite in suites for case in suite.cases], seconds)
    text = render_text("report/templates/junit.xml", whole=whole, suites=suites, counts=_counts)
    return _FORBIDDEN.sub("\ufffd", text)


def _counts(suite: Suite) -> dict[str, str]:
    states = [case.state for case in suite.cases]
    counts = {"tests": len(states), "failures": states.count("failure"), "errors": states.count("error")}
    known = {key: str(count) for key, count in {**counts, "skipped": states.count("skipped")}.items()}
    return {**known, "time": f"{suite.seconds:.3f}", "name": suite.name}


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
