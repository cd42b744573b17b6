"""Command `compress evaluate ARTIFACT`: metrics of the file that ships."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    artifact: Annotated[Path, typer.Argument(help="A run's folder or name, its model/ folder, or any exported model.")],
    recipe: Annotated[Path | None, typer.Option(help="Recipe; default: the recipe.yaml beside the model.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="File or folder of other rows, with the columns of the recipe's test split.")
    ] = None,
    split: Annotated[str, typer.Option(help="The split to evaluate on.")] = "test",
    target: Annotated[str, typer.Option(help="Target of the model; see `compress targets`.")] = "cpu",
    threads: Annotated[int, typer.Option(min=1, help="Threads of the runtime.")] = 2,
    by_slice: Annotated[
        bool, typer.Option("--by-slice", help="Also measure each slice that the recipe defines.")
    ] = False,
    json_: Annotated[bool, typer.Option("--json", help="Write the measurements as JSON.")] = False,
) -> None:
    """Measure the task's metrics of an artifact, with intervals, through the runtime of a target."""
    from compress import api
    from compress.utils.isolation import isolation_record

    rows = api.evaluate(
        artifact,
        recipe=recipe,
        data=data,
        split=split,
        target=target,
        threads=threads,
        by_slice=by_slice,
        progress=True,
    )
    if json_:
        typer.echo(json.dumps([{**row.model_dump(), "isolation": isolation_record()} for row in rows], indent=1))
        return
    from compress.cli.output import render_rows
    from compress.utils.terminal import Console

    Console().print(render_rows(rows))
