"""Command `compress search`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from compress.plugins.search.run import SearchResult


def search(
    recipe: Annotated[
        Path | None, typer.Argument(help="A recipe with a `search:` block; or give --model and --data.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Hugging Face id, local folder or sample:NAME.")] = None,
    data: Annotated[
        str | None, typer.Option(help="A folder with one file per split, a single file, sample:NAME, or a dataset id.")
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="Task, such as text-classification or text-generation; default: the model's.")
    ] = None,
    keep: Annotated[
        float | None, typer.Option(help="Share of the uncompressed model's quality to keep, e.g. 0.985.")
    ] = None,
    max_size: Annotated[str | None, typer.Option(help="Maximum size on disk, e.g. 5MB.")] = None,
    max_latency: Annotated[str | None, typer.Option(help="Maximum latency of one example, e.g. 0.4ms.")] = None,
    minimize: Annotated[list[str] | None, typer.Option(help="size_bytes or latency_ms; repeat it for both.")] = None,
    target: Annotated[str, typer.Option(help="Target of the model.")] = "cpu",
    budget: Annotated[str | None, typer.Option(help="Time for the search: 90s, 60m, 1h30m.")] = None,
    trials: Annotated[int | None, typer.Option(help="Maximum number of recipes to try.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Replace a field of the recipe.")
    ] = None,
    artifacts: Annotated[Path, typer.Option(help="Folder of cache and searches.")] = Path("artifacts"),
    resume: Annotated[bool, typer.Option("--resume", help="Continue the latest search of this recipe.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the parameters and their values, and stop.")] = False,
    workers: Annotated[
        str | None, typer.Option(metavar="ray[:ADDRESS]", help="Try recipes on the machines of a Ray cluster.")
    ] = None,
    track: Annotated[
        str | None, typer.Option(metavar="URI", help="Also write to MLflow: http://host:5000 or sqlite:///runs.db.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Write search.json to standard output.")] = False,
) -> None:
    """Find the recipe that meets the limits and is smallest or fastest; Ctrl-C and --resume continue it."""
    from compress.plugins.search.cli_options import SearchOptions, build_document
    from compress.plugins.search.console import SearchConsole
    from compress.plugins.search.run import SearchRun
    from compress.recipe.document import read_document
    from compress.recipe.shipped import find_recipe

    options = SearchOptions(
        model, data, task, keep, max_size, max_latency, tuple(minimize or ()), target, budget, trials
    )
    given = None if recipe is None else read_document(find_recipe(recipe))
    document, folder, origin = build_document(given, options, set_ or ())
    if dry_run:
        from compress.plugins.search.dry_run import prepare_dry_run

        with prepare_dry_run(document, folder, artifacts) as prepared:
            summary = prepared.summary(origin)
        typer.echo(summary.model_dump_json(indent=2) if json_ else "\n".join(summary.lines()))
        return
    with SearchConsole(lines=json_) as console:
        result = SearchRun(document, folder, artifacts, console, resume, workers, console, origin).run()
    _print_result(result, track, json_)


def _print_result(result: SearchResult, track: str | None, json_: bool) -> None:
    """Track and print a finished search. Exits with code 1 if no recipe meets the limits."""
    from compress.cli.output import show_hint
    from compress.plugins.search.console import search_table
    from compress.utils.terminal import Console

    if track is not None:
        from compress.plugins.search.record import tracked_run
        from compress.report.tracking import track as write

        write(tracked_run(result.record, result.folder), track, result.record.name)
    if json_:
        typer.echo(result.record.model_dump_json(indent=2))
    else:
        Console().print(search_table(result.record))
    final = result.record.final
    names = "search.html" if final is None else "best.yaml, model/ and search.html"
    after = ""
    if final is not None and final.winner.meets_limits:
        after = f" Next: compress run {result.folder / 'best.yaml'}"
    elif final is not None:
        after = " model/ is the winner, which misses a limit. Next: the same command with --resume, or looser limits"
    show_hint(f"{result.folder} has {names}.{after}")
    if final is None or not final.winner.meets_limits:
        raise typer.Exit(1)
