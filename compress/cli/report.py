"""`compress report RUN`: look at a finished run."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class ReportFormat(StrEnum):
    """The views of a report."""

    console = "console"
    markdown = "markdown"
    html = "html"
    json = "json"
    junit = "junit"


def report(
    run: Annotated[Path, typer.Argument(help="A run's folder, its report.json, or a recipe's name.")],
    format: Annotated[ReportFormat, typer.Option(help="The view to write to standard output.")] = ReportFormat.console,
    json_: Annotated[bool, typer.Option("--json", help="The same as --format json.")] = False,
) -> None:
    """Show the report of a finished run."""
    from compress.report.locate import find_report
    from compress.report.schema import parse_report, read_text

    path = find_report(run)
    text = read_text(path)
    found = parse_report(text, str(path))
    match ReportFormat.json if json_ else format:
        case ReportFormat.json:
            _write(text)
        case ReportFormat.markdown:
            from compress.report.markdown import markdown_report

            _write(markdown_report(found))
        case ReportFormat.html:
            from compress.report.html import html_page

            _write(html_page(found))
        case ReportFormat.junit:
            from compress.report.junit import junit_report

            _write(junit_report(found))
        case ReportFormat.console:
            from rich.console import Console

            from compress.report.console import console_table

            Console(file=sys.stdout).print(console_table(found))


def _write(text: str) -> None:
    """UTF-8, whatever the terminal's own encoding, since the views say so of themselves."""
    typer.echo(text.removesuffix("\n").encode("utf-8"))
