"""`compress profile ARTIFACT`: where the time goes, and how close that is to this machine's limit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def profile(
    artifact: Annotated[Path, typer.Argument(help="A run's folder or its model/ folder, or any exported model.")],
    recipe: Annotated[
        Path | None,
        typer.Option(help="Where task and data come from; default: the recipe.yaml beside the model."),
    ] = None,
    target: Annotated[str, typer.Option(help="Where to run it; a target on the processor.")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of the runtime; default: the recipe's.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples in a batch.")] = 1,
    seconds: Annotated[float, typer.Option(min=0.1, help="Time budget of the measurement.")] = 5.0,
    html: Annotated[Path | None, typer.Option(help="Write a page with a roofline chart to this file.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Write the profile as JSON.")] = False,
) -> None:
    """Time every operator on real examples, against the arithmetic and bandwidth that this machine reaches."""
    from compress.cli.artifact import find_artifact, find_target
    from compress.cli.console_progress import ConsoleProgress
    from compress.errors import InputError

    found = find_artifact(artifact, recipe)
    place = find_target(target)
    if html is not None and (html.is_dir() or not html.absolute().parent.is_dir()):
        raise InputError(
            "The page cannot be written there.", where=str(html), expected="the name of a file in a folder that exists"
        )
    if found.task.generates:
        raise InputError(
            f"Operators are timed on examples in batches, and {found.task.name} answers token by token.",
            mend="`compress bench` times prompts and tokens as wholes",
        )
    from compress.bench.operators import profile_operators, refuse_other_devices
    from compress.evaluate import encode_for
    from compress.pipeline.quiet import quiet_libraries

    refuse_other_devices(place)
    quiet_libraries()
    progress = ConsoleProgress()
    benchmark, seed = found.recipe.benchmark, found.recipe.seed
    rows = found.dataset(progress).split("test")
    examples = encode_for(found.folder, found.task, rows, found.recipe.data.max_length)
    settings = (threads or benchmark.threads, batch_size, seconds)
    result = profile_operators(found.folder, examples, place, *settings, progress, seed)
    if html is not None:
        from compress.report.profile_page import profile_page

        try:
            html.write_text(profile_page(result), encoding="utf-8")
        except OSError as error:
            raise InputError(f"The page cannot be written: {error.strerror}.", where=str(html)) from error
        progress.note(f"wrote {html}")
    if json_:
        typer.echo(json.dumps(result.to_json()))
        return
    from rich.console import Console

    from compress.report.profile_console import console_profile
    from compress.report.profile_words import method_notes

    Console().print(console_profile(result))
    for note in method_notes(result):
        typer.echo(note, err=True)
