"""Command `compress evaluate ARTIFACT`: metrics of the file that ships."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    artifact: Annotated[Path, typer.Argument(help="A run's folder or its model/ folder, or any exported model.")],
    recipe: Annotated[Path | None, typer.Option(help="Recipe; default: the recipe.yaml beside the model.")] = None,
    split: Annotated[str, typer.Option(help="The split to evaluate on.")] = "test",
    target: Annotated[str, typer.Option(help="Target of the model; see `compress targets`.")] = "cpu",
    threads: Annotated[int, typer.Option(min=1, help="Threads of the runtime.")] = 2,
    by_slice: Annotated[
        bool, typer.Option("--by-slice", help="Also measure each slice that the recipe defines.")
    ] = False,
    json_: Annotated[bool, typer.Option("--json", help="Write the measurements as JSON.")] = False,
) -> None:
    """Measure the task's metrics of an artifact, with intervals, through the runtime of a target."""
    from compress.cli.output import render_rows
    from compress.formats.target_profile import TargetProfile
    from compress.formats.targets import find_target
    from compress.pipeline.artifact import check_opens, find_artifact
    from compress.report.progress import ConsoleProgress

    loaded = find_artifact(artifact, recipe)
    profile = TargetProfile(find_target(target))
    check_opens(loaded.folder, profile.target)
    from compress.formats.quiet_output import quiet_libraries
    from compress.pipeline import generation_evals
    from compress.pipeline.target_session import TargetSession

    quiet_libraries()
    progress, name = ConsoleProgress(), loaded.folder.name
    # The session caches predictions, which nothing else needs.
    with tempfile.TemporaryDirectory(prefix="compress-evaluate-") as scratch:
        runner = loaded.runner(Path(scratch), progress, threads=threads)
        session = TargetSession(runner, profile, {name: loaded.folder}, split)
        parts, notes = session.parts() if by_slice else ([], [])
        for note in filter(None, [session.examples(name).note, *notes]):
            progress.note(note)
        rows = [
            *session.accuracies(parts),
            *generation_evals.generations(session)[0],
            *generation_evals.choices(session),
            *generation_evals.instructed(session)[0],
            *generation_evals.similarities(session),
            *generation_evals.judgements(session, parts),
        ]
    if json_:
        typer.echo(json.dumps([row.model_dump() for row in rows], indent=1))
        return
    from rich.console import Console

    Console().print(render_rows(rows))
