"""`compress nightly SUITE`: run a suite unattended and watch it over weeks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_INTERRUPTED = 130


def nightly(
    suite: Annotated[Path, typer.Argument(help="The suite, a YAML file.")],
    only: Annotated[
        list[str] | None, typer.Option("--only", metavar="ENTRY", help="Run this entry alone; may be repeated.")
    ] = None,
    artifacts: Annotated[Path, typer.Option(help="Folder of cache, runs and nights.")] = Path("artifacts"),
    workers: Annotated[
        str | None,
        typer.Option(metavar="ray[:ADDRESS]", help="Run the stages on a Ray cluster first; measurements run here."),
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Write night.json to standard output.")] = False,
) -> None:
    """Run every recipe of a suite, gate it against its baseline, and look for drift in the history."""
    from compress.cli.output import show_hint
    from compress.plugins.nightly.suite import read_suite, select_entries
    from compress.report.progress import ConsoleProgress

    # Read the suite before the heavy imports, so that a mistake in it shows at once.
    loaded = select_entries(read_suite(suite), only or ())
    from compress.plugins.nightly.run import NightRun
    from compress.plugins.nightly.views import night_json, write_night

    result = NightRun(loaded, suite.parent, artifacts, ConsoleProgress(), workers).run()
    write_night(result, loaded.description)
    if json_:
        typer.echo(night_json(result), nl=False)
    else:
        from compress.plugins.nightly.views import night_table
        from compress.utils.terminal import Console

        Console().print(night_table(result.night))
    show_hint(f"report: {result.folder / 'night.html'}")
    show_hint(f"history: {result.history}")
    code = _INTERRUPTED if result.interrupted else result.night.exit_code
    if code:
        raise typer.Exit(code)
