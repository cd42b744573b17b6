"""Commands `compress recipes`: list recipes, write their JSON Schema, or start a new one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from compress.utils.errors import InputError, RecipeError, did_you_mean

recipes_app = typer.Typer(help="List recipes, write their JSON Schema, or start a new one.")
_Json = Annotated[bool, typer.Option("--json", help="Write JSON to standard output.")]
RecipeRow = dict[str, Any]
"""Fields of a recipe in the list."""
_Folder = Annotated[Path | None, typer.Argument(help="Folder to look in; default: ./recipes.")]


@recipes_app.callback(invoke_without_command=True)
def recipes(context: typer.Context, json_: _Json = False) -> None:
    """List recipes, write their JSON Schema, or start a new one."""
    if context.invoked_subcommand is None:
        _show(_described(None), json_)


@recipes_app.command("list")
def list_recipes(folder: _Folder = None, json_: _Json = False) -> None:
    """List the recipes of a folder: name, description, task, stages."""
    _show(_described(folder), json_)


@recipes_app.command("schema")
def schema(
    json_: Annotated[bool, typer.Option("--json", help="Has no effect: the schema is JSON.")] = False,
) -> None:
    """Write the JSON Schema of recipes, with which editors complete and check them."""
    from compress.recipe.loading import recipe_schema

    typer.echo(json.dumps(recipe_schema(), indent=2))


@recipes_app.command("new")
def new(
    task: Annotated[str, typer.Option(help="Hugging Face name of the task.")] = "text-classification",
    output: Annotated[Path | None, typer.Option(help="File to write; default: standard output.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
    json_: _Json = False,
) -> None:
    """Write a commented starter recipe, every field explained."""
    from compress.recipe.json_schema import starter, starters

    if task not in starters():
        message = f"There is no starter for the task {task!r}.{did_you_mean(task, starters())}"
        raise InputError(message, expected=f"one of {', '.join(starters())}")
    text = starter(task)
    if output is not None:
        try:
            with output.open("w" if force else "x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError as error:
            hint = "give another name, or --force to replace it"
            raise InputError(f"{output} exists already.", where=str(output), hint=hint) from error
        except OSError as error:
            raise InputError(f"{output} cannot be written: {error.strerror}.", where=str(output)) from error
    if json_:
        typer.echo(json.dumps({"task": task, "file": str(output) if output else None, "recipe": text}))
    elif output is None:
        typer.echo(text, nl=False)
    else:
        typer.echo(str(output))


def _described(folder: Path | None) -> list[RecipeRow]:
    from compress.recipe.loading import read_recipe

    if folder is None:
        # Without `./recipes`, list the recipes beside the package in a source checkout.
        folder, shipped = Path("recipes"), Path(__file__).parents[2] / "recipes"
        folder = shipped if shipped.is_dir() and not folder.is_dir() else folder
    if not folder.is_dir():
        hint = "name a folder with recipes, or start one with `compress recipes new`"
        raise InputError("There is no such folder of recipes.", where=str(folder), hint=hint)
    described = []
    for path in sorted(folder.rglob("*.yaml")):
        row: RecipeRow = {"path": str(path), "name": path.stem, "description": "", "task": None}
        try:
            recipe = read_recipe(path)
        except RecipeError as error:
            # A recipe with mistakes is listed with the number of its problems.
            described.append({**row, "stages": [], "problems": [str(problem) for problem in error.problems]})
            continue
        row |= {"name": recipe.name, "description": recipe.description, "task": recipe.task}
        described.append({**row, "stages": list(recipe.labels()), "problems": []})
    return described


def _show(described: list[RecipeRow], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(described, indent=2))
        return
    for row in described:
        typer.echo(f"{row['path']}: {row['name']}" + (f" ({row['task']})" if row["task"] else ""))
        if row["description"]:
            typer.echo(f"    {row['description']}")
        if row["problems"]:
            typer.echo(f"    {len(row['problems'])} problems: compress check {row['path']}")
        else:
            typer.echo(f"    {' -> '.join(row['stages'])}")
    if not described:
        typer.echo("no recipes", err=True)
