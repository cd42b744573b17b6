"""`compress evaluate ARTIFACT`: accuracy on the file that ships."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    artifact: Annotated[Path, typer.Argument(help="A run's folder or its model/ folder, or any exported model.")],
    recipe: Annotated[
        Path | None,
        typer.Option(help="Where task and data come from; default: the recipe.yaml beside the model."),
    ] = None,
    split: Annotated[str, typer.Option(help="The split to evaluate on.")] = "test",
    target: Annotated[str, typer.Option(help="Where to run it; see `compress targets`.")] = "cpu",
    threads: Annotated[int, typer.Option(min=1, help="Threads of the runtime.")] = 2,
    by_slice: Annotated[
        bool, typer.Option("--by-slice", help="Measure each slice of the split too, as the recipe names them.")
    ] = False,
    json_: Annotated[bool, typer.Option("--json", help="Write the measurements as JSON.")] = False,
) -> None:
    """Measure the task's metrics of an artifact, with intervals, through the runtime of a target."""
    from compress.cli.artifact import find_artifact
    from compress.cli.console_progress import ConsoleProgress
    from compress.cli.rows import render_rows
    from compress.formats.targets import find_target

    found = find_artifact(artifact, recipe)
    place = find_target(target)
    from compress.evaluation.evaluate import encode_for, predict, slices_of_task
    from compress.evaluation.generate import repetition_of
    from compress.pipeline.quiet import quiet_libraries
    from compress.tasks.capability import GENERATES

    quiet_libraries()
    progress = ConsoleProgress()
    data = found.dataset(progress)
    wanted = found.recipe.evaluation
    examples = encode_for(found.folder, found.task, data.split(split), found.recipe.data.max_length, wanted)
    if examples.note:
        progress.note(examples.note)
    predictions = predict(found.folder, found.task, examples, place, threads, progress, f"evaluate on {target}")
    rows = found.task.measure(predictions.kept, predictions.labels, found.folder.name, target)
    if GENERATES in found.task.capabilities and wanted.prompts:
        rows.append(repetition_of(found.folder, examples, wanted, place, threads, progress))
    if wanted.questions:
        from compress.data.questions import find_questions
        from compress.evaluation.choices import choice_rows, choice_scores

        questions = find_questions(wanted.questions, found.recipe_folder)
        scores = choice_scores(found.folder, questions, place, threads, progress, f"choices on {target}")
        rows += choice_rows(questions, scores, found.folder.name, target)
    if wanted.similarity:
        from compress.data.similarity import find_rated_pairs
        from compress.evaluation.similarity import cosines, similarity_rows

        rated = find_rated_pairs(wanted.similarity, found.recipe_folder, progress)
        length = found.recipe.data.max_length
        likeness = cosines(
            found.folder, found.task, rated, length, place, threads, progress, f"similarities on {target}"
        )
        rows += similarity_rows(rated, likeness, found.folder.name, target)
    if by_slice:
        parts, notes = found.parts(data, split, examples)
        rows += slices_of_task(found.task, predictions, rows, parts)
        for note in notes:
            progress.note(note)
    if json_:
        typer.echo(json.dumps([row.model_dump() for row in rows], indent=1))
        return
    from rich.console import Console

    Console().print(render_rows(rows))
