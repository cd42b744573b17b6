"""The limits as JUnit test cases, for build servers."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from compress.report.rows import environment_rows, limit_found
from compress.report.schema import LimitResult, Report

_FORBIDDEN = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit_report(report: Report) -> str:
    """One test suite, one case a limit: missed ones fail, those that were not judged or can't be told are skipped."""
    skipped = sum(limit.skipped or limit.unknown for limit in report.limits)
    counts = {"tests": str(len(report.limits)), "failures": str(len(report.missed)), "skipped": str(skipped)}
    whole = {**counts, "errors": "0", "time": f"{report.seconds or 0:.3f}", "name": plain_xml(report.recipe)}
    root = ElementTree.Element("testsuites", whole)
    suite = ElementTree.SubElement(root, "testsuite", whole)
    if report.started:
        suite.set("timestamp", plain_xml(report.started))
    properties = ElementTree.SubElement(suite, "properties")
    for name, value in environment_rows(report.environment):
        ElementTree.SubElement(properties, "property", {"name": plain_xml(name), "value": plain_xml(value)})
    for limit in report.limits:
        _case(suite, report, limit)
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def plain_xml(value: str) -> str:
    """Without the control characters that XML cannot hold."""
    return _FORBIDDEN.sub("\ufffd", value)


def _case(suite: ElementTree.Element, report: Report, limit: LimitResult) -> None:
    names = {
        "classname": f"{report.recipe}.{limit.target}",
        "name": f"{limit.metric} {limit.limit}",
        "time": "0",
    }
    case = ElementTree.SubElement(suite, "testcase", {key: plain_xml(value) for key, value in names.items()})
    found = plain_xml(limit_found(report, limit))
    if limit.skipped:
        ElementTree.SubElement(case, "skipped", {"message": plain_xml(limit.reason or "the target was skipped")})
    elif limit.unknown:
        ElementTree.SubElement(case, "skipped", {"message": f"{limit.verdict}: {found}"})
    elif not limit.passed:
        message = {"message": f"found {found}", "type": "limit missed"}
        failure = ElementTree.SubElement(case, "failure", message)
        failure.text = plain_xml(f"{limit.metric} on {limit.target}: wanted {limit.limit}, found {found}")
    else:
        ElementTree.SubElement(case, "system-out").text = found
