"""Commands `compress run`, from a recipe to a measured artifact, `check`, which plans a run, and `report`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer


def run(
    recipe: Annotated[Path, typer.Argument(help="The recipe: a YAML file, or the name of a shipped recipe.")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Replace a field, e.g. distill.epochs=2."),
    ] = None,
    artifacts: Annotated[Path, typer.Option(help="Folder of the cache and the runs.")] = Path("artifacts"),
    remeasure: Annotated[
        bool, typer.Option(show_default=False, help="Measure times again even if nothing changed.")
    ] = False,
    track: Annotated[
        str | None, typer.Option(metavar="URI", help="Also write to MLflow: http://host:5000 or sqlite:///runs.db.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Write report.json to standard output.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show errors and results only.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Also show details, such as each layer.")] = False,
) -> None:
    """Run a recipe. Finished stages come from the cache, so a stopped run continues where it was."""
    from compress import api
    from compress.stages.training.processes import is_first
    from compress.utils.progress import is_shown, set_verbosity
    from compress.utils.terminal import Console

    if quiet or verbose:
        set_verbosity(quiet, verbose)

    # Further training processes only take part in stages that train together.
    if not is_first():
        from compress.pipeline.run import take_part

        take_part(*api.read_recipe(recipe, set_ or ()), artifacts)
        return
    finished = api.run(recipe, set=set_ or (), artifacts=artifacts, remeasure=remeasure, progress=True)
    loaded = finished.recipe
    if track is not None:
        from compress.report.tracking import track as write
        from compress.report.tracking import tracked_run

        write(tracked_run(finished.report, finished.folder), track, loaded.name)
    from compress.report.console import closing_line, console_table
    from compress.report.run_folder import RUNS

    if json_:
        typer.echo(finished.report.to_json(), nl=False)
    else:
        # Standard error has shown them already.
        shown = finished.announced if is_shown(logging.INFO) else ()
        Console().print(console_table(finished.report, shown))
    for limit in finished.report.limits:
        if limit.unknown and loaded.verdicts.action(bool(limit.within_chance)) == "warn":
            name = f"{limit.metric} on {limit.target}, {limit.limit}"
            typer.echo(f"warning: {name}: inconclusive, {limit.reason}", err=True)
    if is_shown(logging.INFO):
        name = loaded.name if artifacts / "runs" == RUNS else str(finished.folder)
        console = Console(stderr=True)
        # A terminal wraps lines between words; in a file the text stays on one line.
        line = closing_line(finished.report, finished.folder, name)
        console.print(line, markup=False, soft_wrap=not console.is_terminal)
    if finished.report.missed:
        raise typer.Exit(1)
    if finished.report.unfit:
        raise typer.Exit(3)


def check(
    recipe: Annotated[Path, typer.Argument(help="The recipe: a YAML file, or the name of a shipped recipe.")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Replace a field, e.g. distill.epochs=2."),
    ] = None,
    artifacts: Annotated[Path, typer.Option(help="Folder of the cache and the runs.")] = Path("artifacts"),
    json_: Annotated[bool, typer.Option("--json", help="Write the plan as JSON.")] = False,
) -> None:
    """Check that a recipe can run, and predict its time, memory and disk, before any model is loaded.

    With --verbose it also says how each number is estimated.
    """
    from compress import api

    plan = api.check(recipe, set=set_ or (), artifacts=artifacts, progress=True)
    if json_:
        typer.echo(plan.model_dump_json(indent=2))
        return
    from compress.pipeline.plan import render_plan, render_warnings
    from compress.utils.progress import is_shown
    from compress.utils.terminal import Console

    if not is_shown(logging.INFO):
        Console().print(render_warnings(plan))
        return
    Console().print(render_plan(plan, details=is_shown(logging.DEBUG)))


def report(
    run: Annotated[Path, typer.Argument(help="A run's folder, its report.json, or a recipe's name.")],
    format: Annotated[
        Literal["console", "markdown", "html", "json", "junit"],
        typer.Option(help="Format of the output."),
    ] = "console",
    json_: Annotated[bool, typer.Option("--json", help="The same as --format json.")] = False,
) -> None:
    """Show the report of a finished run."""
    from compress.cli.output import show, show_hint
    from compress.report.run_folder import find_report, unfinished_run
    from compress.results.report import Report, parse_report, read_text

    path = find_report(run)
    if (unfinished := unfinished_run(run)) is not None:
        show_hint(f"A later run has no report: {unfinished}. It was interrupted, failed, or still runs.")
    text = read_text(path)
    parsed = parse_report(text, str(path))
    # The file itself is the JSON view, so that no field is lost.
    if json_ or format == "json":
        show(text)
        return
    from compress.report.console import console_table
    from compress.report.junit import junit_report
    from compress.report.pages import html_page, markdown_report

    views: dict[str, Callable[[Report], Any]] = {
        "console": console_table,
        "markdown": markdown_report,
        "html": html_page,
        "junit": junit_report,
    }
    show(views[format](parsed))
