"""`compress diff A B`: what differs between two models, in their files, their weights and their answers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from compress.plugins.diff.models import Side
    from compress.utils.progress import Progress


def diff(
    before: Annotated[
        str,
        typer.Argument(
            metavar="A",
            help="A run's folder or name, a folder or file of any format, sample:NAME or a Hub id.",
        ),
    ],
    after: Annotated[str, typer.Argument(metavar="B", help="What it is compared with, of this or another format.")],
    depth: Annotated[
        Literal["files", "weights", "answers"],
        typer.Option(help="How deep to look: settings alone, every tensor too, or what both answer as well."),
    ] = "answers",
    data: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Rows to ask both: a CSV, JSONL or Parquet file."),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="Where task and data come from; default: the recipe beside B, or A.")
    ] = None,
    at_most: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=NUMBER",
            help="A bound; exit code 1 where it is missed: fields, weights, rounding, tensors, flips, divergence, "
            "activations. May be given several times.",
        ),
    ] = None,
    format: Annotated[
        Literal["console", "html", "json"], typer.Option(help="The view to write to standard output.")
    ] = "console",
    json_: Annotated[bool, typer.Option("--json", help="The same as --format json.")] = False,
) -> None:
    """Say what differs between two models: files and recipe, every tensor, answers; and what to look at first."""
    from compress.cli.console_progress import ConsoleProgress
    from compress.cli.output import show
    from compress.formats.quiet_output import quiet_libraries
    from compress.plugins.diff.limits import read_limits
    from compress.plugins.diff.models import Wanted, compare_models
    from compress.plugins.diff.views import console_diff, html_diff
    from compress.utils.progress import SilentProgress

    limits = read_limits(at_most or ())
    view = "json" if json_ else format
    progress = SilentProgress() if view == "json" else ConsoleProgress()
    sides = find_side(before, progress), find_side(after, progress)
    if depth == "answers":
        quiet_libraries()
    found = compare_models(*sides, Wanted(depth, data, recipe, limits), progress)
    if view == "json":
        show(found.model_dump_json(indent=2, by_alias=True))
    else:
        show(html_diff(found) if view == "html" else console_diff(found))
    if any(one.state == "missed" for one in found.limits):
        raise typer.Exit(1)


def find_side(given: str, progress: Progress) -> Side:
    """The model that a name stands for, and its run. Raises `ModelError` where there is none."""
    from compress.cli.artifact import generating_artifact
    from compress.plugins.diff.models import Side
    from compress.report.run_folder import RECIPE, REPORT
    from compress.sources.resolve import find_model

    place = generating_artifact(Path(given))
    model = place if place.exists() else find_model(given, progress)
    folders = (model, model.parent, model.parent.parent)
    run = next((folder for folder in folders if (folder / RECIPE).is_file() or (folder / REPORT).is_file()), None)
    return Side(given, model, run)
