"""`compress report RUN`: look at a finished run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def report(
    run: Annotated[Path, typer.Argument(help="A run's folder, its report.json, or a recipe's name.")],
    format: Annotated[
        Literal["console", "markdown", "html", "json", "junit"],
        typer.Option(help="The view to write to standard output."),
    ] = "console",
    json_: Annotated[bool, typer.Option("--json", help="The same as --format json.")] = False,
) -> None:
    """Show the report of a finished run."""
    from compress.cli.output import show
    from compress.report.run_folder import find_report
    from compress.results.report import parse_report, read_text

    path = find_report(run)
    text = read_text(path)
    found = parse_report(text, str(path))
    if json_ or format == "json":
        show(text)
        return
    from compress.report.console import console_table
    from compress.report.junit import junit_report
    from compress.report.pages import html_page, markdown_report

    views = {"console": console_table, "markdown": markdown_report, "html": html_page, "junit": junit_report}
    show(views[format](found))
