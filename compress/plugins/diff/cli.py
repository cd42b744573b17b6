"""Command `compress diff A B`."""

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
    after: Annotated[str, typer.Argument(metavar="B", help="Model to compare with, in the same or another format.")],
    depth: Annotated[
        Literal["files", "weights", "answers"],
        typer.Option(help="Depth: settings; settings and tensors; or settings, tensors and outputs."),
    ] = "answers",
    data: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Input rows for both models: a CSV, JSONL or Parquet file."),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="Recipe with task and data; default: the recipe beside B, or A.")
    ] = None,
    at_most: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=NUMBER",
            help="Upper bound on fields, weights, rounding, tensors, flips, divergence or activations; exit code 1 if "
            "exceeded; repeatable.",
        ),
    ] = None,
    format: Annotated[Literal["console", "html", "json"], typer.Option(help="Format of the output.")] = "console",
    json_: Annotated[bool, typer.Option("--json", help="The same as --format json.")] = False,
) -> None:
    """List the differences of two models: files, recipe, tensors and answers; the most important ones first."""
    from compress.cli.output import show
    from compress.formats.quiet_output import quiet_libraries
    from compress.plugins.diff.models import DiffRequest, compare_models, read_limits
    from compress.plugins.diff.views import console_diff, html_diff
    from compress.report.progress import ConsoleProgress
    from compress.utils.isolation import isolation_record
    from compress.utils.progress import SilentProgress

    limits = read_limits(at_most or ())
    view = "json" if json_ else format
    progress = SilentProgress() if view == "json" else ConsoleProgress()
    sides = find_side(before, progress), find_side(after, progress)
    if depth == "answers":
        quiet_libraries()
    result = compare_models(*sides, DiffRequest(depth, data, recipe, limits), progress)
    result = result.model_copy(update={"isolation": isolation_record()})
    if view == "json":
        show(result.model_dump_json(indent=2, by_alias=True))
    else:
        show(html_diff(result) if view == "html" else console_diff(result))
    if any(limit.state == "missed" for limit in result.limits):
        raise typer.Exit(1)


def find_side(name: str, progress: Progress) -> Side:
    """Return the model with this name or path, and its run.

    Raises:
        ModelError: No such model exists.
    """
    from compress.plugins.diff.models import Side
    from compress.report.run_folder import RECIPE, REPORT, model_folder
    from compress.sources.resolve import find_model

    path = model_folder(Path(name)) or Path(name)
    model = path if path.exists() else find_model(name, progress)
    folders = (model, model.parent, model.parent.parent)
    run = next((folder for folder in folders if (folder / RECIPE).is_file() or (folder / REPORT).is_file()), None)
    return Side(name, model, run)
