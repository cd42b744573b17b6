"""Command `compress ab A B --traffic FILE`: compares two models on recorded requests."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def ab(
    a: Annotated[
        Path, typer.Argument(metavar="A", help="The model in use: a run's folder or name, or its model/ folder.")
    ],
    b: Annotated[Path, typer.Argument(metavar="B", help="The model that may replace it.")],
    traffic: Annotated[
        Path,
        typer.Option(help="Recorded requests: JSONL or CSV with the task's inputs, `at`, perhaps `id` and `label`."),
    ],
    labels: Annotated[
        Path | None, typer.Option(help="Labels that arrived later: a file with `id` and `label`, in order of arrival.")
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="Recipe; default: the recipe.yaml beside each model.")] = None,
    target: Annotated[str, typer.Option(help="Target of both; see `compress targets`.")] = "cpu",
    threads: Annotated[int, typer.Option(min=1, help="Threads of the runtime.")] = 2,
    speed: Annotated[float, typer.Option(min=0.01, help="Factor by which requests arrive faster than recorded.")] = 1.0,
    margin: Annotated[float, typer.Option(min=0, help="Smallest difference in accuracy that matters.")] = 0.01,
    cost_margin: Annotated[
        float, typer.Option(min=0, help="Smallest relative change of times or bytes that matters: 0.05 is 5%.")
    ] = 0.05,
    level: Annotated[
        float, typer.Option(min=0.001, max=0.2, help="Probability of a wrong verdict on equally good models.")
    ] = 0.05,
    timed: Annotated[
        bool, typer.Option("--timed/--answers-only", help="Also replay the requests at their recorded times.")
    ] = True,
    json_: Annotated[bool, typer.Option("--json", help="Write everything as JSON.")] = False,
) -> None:
    """Replay requests through A and B: better, same, worse, or can't tell. Exit code 1: B is worse in a quantity."""
    from compress.cli.output import show
    from compress.formats.targets import find_target
    from compress.pipeline.artifact import check_opens, find_artifact
    from compress.plugins.monitoring.outputs import ServedModel
    from compress.plugins.monitoring.rows import input_columns
    from compress.plugins.monitoring.traffic import read_traffic
    from compress.report.progress import ConsoleProgress
    from compress.utils.errors import InputError
    from compress.utils.progress import SilentProgress

    sides, runtime_target = (find_artifact(a, recipe), find_artifact(b, recipe)), find_target(target)
    for side in sides:
        check_opens(side.folder, runtime_target)
    first, second = (side.task.name for side in sides)
    if first != second:
        raise InputError(f"A is for {first} and B for {second}.", expected="two models for one task")
    # Read the traffic before the heavy imports, so that a mistake in it shows at once.
    requests = read_traffic(traffic, input_columns(sides[0].task.columns), labels)
    from compress.formats.quiet_output import quiet_libraries
    from compress.plugins.monitoring.ab import AbOptions, compare_in_use, named_labels
    from compress.plugins.monitoring.views import console_ab

    quiet_libraries()
    models = [ServedModel(side.folder, side.recipe, side.task, runtime_target, threads) for side in sides]
    progress = SilentProgress() if json_ else ConsoleProgress()
    labeled = named_labels(requests, sides[0].folder)
    options = AbOptions(speed, level, margin, cost_margin, timed)
    result = compare_in_use(models, labeled, (str(a), str(b)), progress, options)
    show(result.model_dump_json(indent=1) if json_ else console_ab(result))
    if result.worse:
        raise typer.Exit(1)


def drift(
    artifact: Annotated[Path, typer.Argument(help="A run's folder or name, its model/ folder, or any exported model.")],
    recent: Annotated[
        str, typer.Option(help="Today's inputs: a file with the columns of the recipe's data, or sample:NAME/SPLIT.")
    ],
    reference: Annotated[
        str | None,
        typer.Option(help="Reference rows that no stage has read; default: the test split of the recipe."),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(help="Recipe with task and data; default: the recipe.yaml beside the model."),
    ] = None,
    target: Annotated[str, typer.Option(help="Target of the model; see `compress targets`.")] = "cpu",
    threads: Annotated[int, typer.Option(min=1, help="Threads of the runtime.")] = 2,
    rows: Annotated[int, typer.Option(min=20, help="Maximum number of rows of each side, chosen at random.")] = 1000,
    level: Annotated[
        float, typer.Option(min=0.001, max=0.1, help="Probability that all tests together report a drift without one.")
    ] = 0.005,
    html: Annotated[Path | None, typer.Option(help="Write a page with charts to this file.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Write everything as JSON.")] = False,
) -> None:
    """Test words, lengths, activations and answers for drift, and recommend stages. Exit code 1: there is drift."""
    from compress.cli.output import show
    from compress.formats.targets import find_target
    from compress.pipeline.artifact import check_opens, find_artifact
    from compress.report.progress import ConsoleProgress
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
    from compress.plugins.monitoring.outputs import ServedModel
    from compress.plugins.monitoring.rows import read_sample
    from compress.plugins.monitoring.views import console_drift, html_drift

    quiet_libraries()
    progress, columns = SilentProgress() if json_ else ConsoleProgress(), loaded.task.columns
    arguments = loaded.recipe, columns, loaded.recipe_folder, rows, progress
    # Read the recent rows first, which are more likely to contain a mistake.
    recent_rows = read_sample(recent, *arguments)
    reference_rows = read_sample(reference, *arguments)
    model = ServedModel(loaded.folder, loaded.recipe, loaded.task, runtime_target, threads)
    result = find_drift(model, reference_rows, recent_rows, progress, level, str(artifact))
    if html is not None:
        from compress.report.run_folder import write_atomically

        write_atomically(html, html_drift(result))
    show(result.model_dump_json(indent=1) if json_ else console_drift(result))
    if result.drifted:
        raise typer.Exit(1)
