"""Command `compress ab A B --traffic FILE`: compares two models on recorded requests."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def ab(
    a: Annotated[Path, typer.Argument(metavar="A", help="The model in use: a run's folder or its model/ folder.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="The one that may replace it.")],
    traffic: Annotated[
        Path,
        typer.Option(help="Recorded requests: JSONL or CSV with the task's inputs, `at`, perhaps `id` and `label`."),
    ],
    labels: Annotated[
        Path | None, typer.Option(help="Labels that came later: a file with `id` and `label`, in their order.")
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(help="Where the task comes from; default: the recipe.yaml beside each model."),
    ] = None,
    target: Annotated[str, typer.Option(help="Where to run both; see `compress targets`.")] = "cpu",
    threads: Annotated[int, typer.Option(min=1, help="Threads of the runtime.")] = 2,
    speed: Annotated[float, typer.Option(min=0.01, help="How many times faster than recorded requests arrive.")] = 1.0,
    margin: Annotated[float, typer.Option(min=0, help="The smallest difference of right answers that matters.")] = 0.01,
    cost_margin: Annotated[
        float, typer.Option(min=0, help="The smallest change of a time, or of bytes, that matters: 0.05 is 5%.")
    ] = 0.05,
    level: Annotated[
        float, typer.Option(min=0.001, max=0.2, help="How often a verdict on equally good models may be wrong.")
    ] = 0.05,
    timed: Annotated[bool, typer.Option("--timed/--answers-only", help="Replay the traffic at its times too.")] = True,
    json_: Annotated[bool, typer.Option("--json", help="Write everything as JSON.")] = False,
) -> None:
    """Replay requests through both: better, same, worse, or can't tell. Exit code 1: B is worse in something."""
    from compress.cli.artifact import check_opens, find_artifact
    from compress.cli.console_progress import ConsoleProgress
    from compress.cli.output import show
    from compress.formats.targets import find_target
    from compress.plugins.monitoring.outputs import Model
    from compress.plugins.monitoring.rows import input_columns
    from compress.plugins.monitoring.traffic import read_traffic
    from compress.utils.errors import InputError
    from compress.utils.progress import SilentProgress

    sides, runtime_target = (find_artifact(a, recipe), find_artifact(b, recipe)), find_target(target)
    for side in sides:
        check_opens(side.folder, runtime_target)
    first, second = (side.task.name for side in sides)
    if first != second:
        raise InputError(f"A is for {first} and B for {second}.", expected="two models for one task")
    requests = read_traffic(traffic, input_columns(sides[0].task.columns), labels)
    from compress.formats.quiet_output import quiet_libraries
    from compress.plugins.monitoring.ab import compare_in_use, named_labels
    from compress.plugins.monitoring.views import console_ab

    quiet_libraries()
    models = [Model(side.folder, side.recipe, side.task, runtime_target, threads) for side in sides]
    result = compare_in_use(
        (models[0], models[1]),
        named_labels(requests, sides[0].folder),
        (str(a), str(b)),
        SilentProgress() if json_ else ConsoleProgress(),
        speed=speed,
        level=level,
        margin=margin,
        cost_margin=cost_margin,
        timed=timed,
    )
    show(result.model_dump_json(indent=1) if json_ else console_ab(result))
    if result.worse:
        raise typer.Exit(1)
