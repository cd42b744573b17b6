"""Command `compress drift ARTIFACT --recent FILE`: tests whether inputs have drifted since the model was compressed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def drift(
    artifact: Annotated[Path, typer.Argument(help="A run's folder or its model/ folder, or any exported model.")],
    recent: Annotated[
        str, typer.Option(help="Today's inputs: a file with the columns of the recipe's data, or sample:NAME/SPLIT.")
    ],
    reference: Annotated[
        str | None,
        typer.Option(help="Rows to compare with, which no stage has seen; default: the test split of the recipe."),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(help="Where task and data come from; default: the recipe.yaml beside the model."),
    ] = None,
    target: Annotated[str, typer.Option(help="Where to run it; see `compress targets`.")] = "cpu",
    threads: Annotated[int, typer.Option(min=1, help="Threads of the runtime.")] = 2,
    rows: Annotated[int, typer.Option(min=20, help="So many rows of either side at most, drawn at random.")] = 1000,
    level: Annotated[
        float,
        typer.Option(min=0.001, max=0.1, help="How often all looks together may find a drift where there is none."),
    ] = 0.005,
    html: Annotated[Path | None, typer.Option(help="Write a page with charts to this file.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Write everything as JSON.")] = False,
) -> None:
    """Test words, lengths, activations and answers for drift, and advise what to do. Exit code 1: there is drift."""
    from compress.cli.artifact import check_opens, find_artifact
    from compress.cli.console_progress import ConsoleProgress
    from compress.cli.output import show
    from compress.formats.targets import find_target
    from compress.utils.errors import InputError
    from compress.utils.progress import SilentProgress

    if html is not None and (html.is_dir() or not html.absolute().parent.is_dir()):
        raise InputError(
            "The page cannot be written there.", where=str(html), expected="a file in a folder that exists"
        )
    loaded, runtime_target = find_artifact(artifact, recipe), find_target(target)
    check_opens(loaded.folder, runtime_target)
    from compress.formats.quiet_output import quiet_libraries
    from compress.plugins.monitoring.drift import find_drift
    from compress.plugins.monitoring.outputs import Model
    from compress.plugins.monitoring.rows import read_sample, recorded_sample
    from compress.plugins.monitoring.views import console_drift, html_drift

    quiet_libraries()
    progress, columns = SilentProgress() if json_ else ConsoleProgress(), loaded.task.columns
    arguments = loaded.recipe, columns, loaded.recipe_folder, rows, progress
    recent_rows = read_sample(recent, *arguments)
    reference_rows = recorded_sample(*arguments) if reference is None else read_sample(reference, *arguments)
    model = Model(loaded.folder, loaded.recipe, loaded.task, runtime_target, threads)
    result = find_drift(model, reference_rows, recent_rows, progress, level, str(artifact))
    if html is not None:
        from compress.report.run_folder import write_atomically

        write_atomically(html, html_drift(result))
    show(result.model_dump_json(indent=1) if json_ else console_drift(result))
    if result.drifted:
        raise typer.Exit(1)
