"""`compress check`: can a recipe run here, and what will it take?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def check(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Replace a field, e.g. stages.1.distill.epochs=2."),
    ] = None,
    artifacts: Annotated[Path, typer.Option(help="The folder that cache and runs are kept in.")] = Path("artifacts"),
    json_: Annotated[bool, typer.Option("--json", help="Write the plan as JSON.")] = False,
) -> None:
    """Prove that a recipe can run, and predict its time, memory and disk, before any model is loaded."""
    from compress.pipeline.forecast import Forecast
    from compress.plan import make_plan, render_plan
    from compress.recipe_source import read_recipe

    loaded = read_recipe(recipe, set_ or ())
    plan = make_plan(loaded, recipe.parent, Forecast(loaded, recipe.parent, artifacts), artifacts)
    if json_:
        typer.echo(plan.model_dump_json(indent=2))
        return
    from rich.console import Console

    Console().print(render_plan(plan))
