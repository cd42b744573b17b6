"""Write the parts of the documentation that come from the code: `make docs`."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from compress.cli import app
from compress.nightly.suite import suite_schema
from compress.recipe_source import recipe_schema

FOLDER = Path(__file__).parent


def commands() -> str:
    """Every command with its arguments and options, as Markdown."""
    root = typer.main.get_command(app)
    lines = ["# Commands", "", "Written by `make docs` from the code.", ""]
    for name, command in sorted(_leaves(root, "compress")):
        lines += [f"## {name}", "", (command.help or "").strip(), "", "| parameter | meaning |", "|---|---|"]
        for parameter in command.params:
            if parameter.name in ("help", "install_completion", "show_completion"):
                continue
            shown = (
                (parameter.metavar or str(parameter.name).upper())
                if parameter.param_type_name == "argument"
                else parameter.opts[0]
            )
            lines.append(f"| `{shown}` | {getattr(parameter, 'help', None) or ''} |")
        lines.append("")
    return "\n".join(lines)


def _leaves(command: typer.core.TyperCommand, name: str) -> list[tuple[str, typer.core.TyperCommand]]:
    children = getattr(command, "commands", {})
    own = [] if children and not getattr(command, "invoke_without_command", False) else [(name, command)]
    return own + [leaf for child, below in children.items() for leaf in _leaves(below, f"{name} {child}")]


if __name__ == "__main__":
    (FOLDER / "commands.md").write_text(commands())
    (FOLDER / "recipe.schema.json").write_text(json.dumps(recipe_schema(), indent=2) + "\n")
    (FOLDER / "suite.schema.json").write_text(json.dumps(suite_schema(), indent=2) + "\n")
