"""Commands `compress recipes`: list recipes, write their JSON Schema, or start a new one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from compress.utils.errors import InputError, RecipeError, did_you_mean

recipes_app = typer.Typer(help="List recipes, write their JSON Schema, or start a new one.")
_Json = Annotated[bool, typer.Option("--json", help="Write JSON to standard output.")]
RecipeRow = dict[str, Any]
"""Fields of a recipe in the list."""
_Folder = Annotated[Path | None, typer.Argument(help="Folder to look in; default: the shipped recipes.")]


@recipes_app.callback(invoke_without_command=True)
def recipes(context: typer.Context, json_: _Json = False) -> None:
    """List recipes, write their JSON Schema, or start a new one."""
    if context.invoked_subcommand is None:
        _show(_described(None), json_)


@recipes_app.command("list", epilog="Example: compress recipes list my-recipes")
def list_recipes(folder: _Folder = None, json_: _Json = False) -> None:
    """List the recipes of a folder: name, description, task, stages."""
    _show(_described(folder), json_)


@recipes_app.command("copy", epilog="Example: compress recipes copy quickstart")
def copy(
    name: Annotated[str, typer.Argument(help="Name of a shipped recipe, as `compress recipes` lists it.")],
    folder: Annotated[Path, typer.Argument(help="Folder to copy to.")] = Path(),
    force: Annotated[bool, typer.Option("--force", help="Replace files that exist.")] = False,
    json_: _Json = False,
) -> None:
    """Copy a recipe that is installed with compress, with the files that it names, to change it."""
    from compress.recipe.shipped import copy_recipe

    copies = [str(path) for path in copy_recipe(name, folder, force)]
    typer.echo(json.dumps(copies) if json_ else "\n".join(copies))


@recipes_app.command("schema", epilog="Example: compress recipes schema > recipe.schema.json")
def schema(
    json_: Annotated[bool, typer.Option("--json", help="Has no effect: the schema is JSON.")] = False,
) -> None:
    """Write the JSON Schema of recipes, with which editors complete and check them."""
    from compress.recipe.loading import recipe_schema

    typer.echo(json.dumps(recipe_schema(), indent=2))


@recipes_app.command("new", epilog="Example: compress recipes new --output recipe.yaml")
def new(
    task: Annotated[str, typer.Option(help="Hugging Face name of the task.")] = "text-classification",
    output: Annotated[Path | None, typer.Option(help="File to write; default: standard output.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
    json_: _Json = False,
) -> None:
    """Write a task's starter recipe, every field explained; `compress init` writes one for your model and data."""
    from compress.cli.output import show_hint, write_new_file
    from compress.recipe.json_schema import starter, starters

    show_hint("`compress init` writes a short recipe for your model and data, with --full every field.")

    if task not in starters():
        message = f"There is no starter for the task {task!r}.{did_you_mean(task, starters())}"
        raise InputError(message, expected=f"one of {', '.join(starters())}")
    text = starter(task)
    if output is not None:
        write_new_file(output, text, force)
    if json_:
        typer.echo(json.dumps({"task": task, "file": str(output) if output else None, "recipe": text}))
    elif output is None:
        typer.echo(text, nl=False)
    else:
        typer.echo(str(output))


def _described(folder: Path | None) -> list[RecipeRow]:
    from compress.recipe.loading import read_recipe
    from compress.recipe.shipped import SHIPPED, header_field

    folder = folder or SHIPPED
    if not folder.is_dir():
        hint = "name a folder with recipes, or start one with `compress init`"
        raise InputError("There is no such folder of recipes.", where=str(folder), hint=hint)
    described = []
    for path in sorted(folder.rglob("*.yaml")):
        row: RecipeRow = {"path": str(path), "name": path.stem, "description": "", "task": None}
        row |= {"time": header_field(path, "time"), "expect": header_field(path, "expect")}
        try:
            recipe = read_recipe(path)
        except RecipeError as error:
            # A recipe with mistakes is listed with the number of its problems.
            described.append({**row, "stages": [], "problems": [str(problem) for problem in error.problems]})
            continue
        row |= {"name": recipe.name, "description": recipe.description, "task": recipe.task}
        described.append({**row, "stages": list(recipe.labels()), "problems": []})
    return described


_SIZE = r"([\d.]+) ?([kMG]B)"


def _size(expect: str) -> str:
    """Return the size after compression and its ratio to the size before, which a recipe's header states, or nothing.

    Headers write `90.8 MB -> 8.33 MB`, `3.03 -> 1.03 MB` or `74 MB instead of 540`.
    """
    if change := re.search(rf"([\d.]+)(?: ([kMG]B))? -> {_SIZE}", expect):
        before, before_unit, after, unit = change.groups()
    elif change := re.search(rf"{_SIZE} instead of ([\d.]+)", expect):
        after, unit, before = change.groups()
        before_unit = unit
    else:
        return ""
    ratio = float(before) / float(after) * _UNITS[before_unit or unit] / _UNITS[unit]
    return f"{after} {unit} ({ratio:.3g}x)"


_UNITS = {"kB": 1e3, "MB": 1e6, "GB": 1e9}


def _show(described: list[RecipeRow], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(described, indent=2))
        return
    if not described:
        typer.echo("no recipes", err=True)
        return
    from rich.table import Table

    from compress.cli.output import show_hint
    from compress.utils.terminal import Console

    table = Table(box=None, pad_edge=False)
    for heading in ("name", "task", "quality", "size", "time"):
        table.add_column(heading, no_wrap=heading in ("name", "size", "time"))
    for row in described:
        count = len(row["problems"])
        result = f"{count} problem{'s' * (count != 1)}: compress check {row['path']}" if count else row["expect"]
        # The first clause; the recipe itself has all of it.
        quality = result if count else re.split(r"[;:,(]|\. | on | with ", result)[0] or row["description"]
        time = re.match(r"(about )?(\d+ h )?\d+ (min|s)", row["time"])
        table.add_row(
            row["name"], row["task"] or "", quality.replace(" -> ", "\u2192"), _size(row["expect"]), time and time[0]
        )
    Console().print(table)
    show_hint("compress run NAME runs a recipe, and compress recipes copy NAME copies it to this folder.")
