"""Command `compress inspect`: sizes of the parts of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def inspect(
    model: Annotated[
        str,
        typer.Argument(
            help="A run's folder or name, a model's folder, a .safetensors, .gguf or .onnx file, sample:NAME, "
            "or the id of a model downloaded from the Hub."
        ),
    ],
    depth: Annotated[int, typer.Option(min=0, help="Levels of modules in the tree.")] = 3,
    weights: Annotated[
        bool, typer.Option("--weights", help="Also read the weights: zeros, range, mean, standard deviation, outliers.")
    ] = False,
    calls: Annotated[
        bool,
        typer.Option(
            "--calls", help="For a pipeline that generates images: predict the cost of a call of each component."
        ),
    ] = False,
    top: Annotated[int, typer.Option(min=0, help="Number of the largest tensors to list.")] = 10,
    json_: Annotated[bool, typer.Option("--json", help="Write everything as JSON.")] = False,
) -> None:
    """Show where a model's bytes and parameters are, by module, type and share."""
    from compress.inspection.budget import budget_of
    from compress.report.progress import ConsoleProgress
    from compress.report.run_folder import model_folder
    from compress.sources.resolve import find_model
    from compress.utils.isolation import isolation_record
    from compress.utils.progress import SilentProgress

    progress = SilentProgress() if json_ else ConsoleProgress()
    path = find_model(str(model_folder(Path(model)) or model), progress)
    budget = budget_of(path, weights=weights, calls=calls, progress=progress, name=model)
    budget = budget.model_copy(update={"isolation": isolation_record()})
    if json_:
        typer.echo(budget.model_dump_json(indent=2))
        return
    from compress.inspection.budget_rendering import write_budget
    from compress.utils.terminal import Console

    write_budget(budget, depth, top, Console())
