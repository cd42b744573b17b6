"""Command line. Importing this imports typer and no command; each command is imported when it is called."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from compress import __version__
from compress.plugins import Command, Extension, explain_missing, find_commands

INTERRUPTED = 130
CORE_COMMANDS: Mapping[str, Command] = {
    "run": Command("compress.cli.run:run", "Run a recipe. Finished stages come from the cache."),
    "check": Command(
        "compress.cli.run:check",
        "Prove that a recipe can run, and predict its time, memory and disk, without loading a model.",
    ),
    "inspect": Command(
        "compress.cli.inspect:inspect", "Show where a model's bytes and parameters are, by module, type and share."
    ),
    "evaluate": Command(
        "compress.cli.evaluate:evaluate",
        "Measure an artifact's metrics, with intervals, through the runtime of a target.",
    ),
    "bench": Command("compress.cli.bench:bench", "Time an artifact on real examples, or as it generates text."),
    "profile": Command(
        "compress.cli.profile:profile",
        "Time every operator, against the arithmetic and bandwidth that this machine reaches.",
    ),
    "compare": Command(
        "compress.cli.compare:compare",
        "Compare two runs, or a run's model with its own baseline: better, same, worse, or inconclusive.",
    ),
    "gate": Command(
        "compress.cli.compare:gate",
        "Judge a run against a baseline by a policy. Exit code 1: something got worse than allowed.",
    ),
    "report": Command("compress.cli.run:report", "Show the report of a finished run."),
    "doctor": Command(
        "compress.cli.doctor:doctor",
        "Check this machine and installation, or a model. Exit code 1: something must be fixed first.",
    ),
    "targets": Command(
        "compress.cli.targets:targets", "List the targets, and why some are unavailable on this machine."
    ),
    "recipes": Command(
        "compress.cli.recipes:recipes_app", "List recipes, write their JSON Schema, or start a new one."
    ),
    "samples": Command("compress.cli.samples:samples_app", "List samples and fetch them into the user's cache folder."),
    "cache": Command("compress.cli.cache:cache_app", "List or remove the outputs of finished stages."),
}
PLUGIN_PANEL = "Commands of plug-ins"


class CommandGroup(TyperGroup):
    """Commands of the core and of the plug-ins, each of which is imported when it is called and not to list it."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        plugin_commands = find_commands(reserved=CORE_COMMANDS)
        self.references = {**CORE_COMMANDS, **plugin_commands}
        # `compress --help` and the suggestions for a mistyped name need names and help texts alone.
        for name, command in self.references.items():
            panel = PLUGIN_PANEL if name in plugin_commands else None
            self.add_command(TyperCommand(name, short_help=command.help, help=command.help, rich_help_panel=panel))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Import and return the command that ``args`` calls. Raises `InputError` if its plug-in cannot be imported."""
        # A command of a plug-in that is not installed gets an explanation.
        if args[0] not in self.commands and (explanation := explain_missing("commands", args[0])):
            ctx.fail(f"No such command {args[0]!r}. It needs {explanation}.")
        name, _, remaining = super().resolve_command(ctx, args)
        if name is None:
            return name, None, remaining
        reference = self.references[name].reference
        try:
            function = Extension("commands", name, "compress", reference).load()
        except Exception as error:
            # An error in the core is a bug, whose traceback helps.
            if name in CORE_COMMANDS:
                raise
            from compress.utils.errors import InputError

            raise InputError(
                f"The command {name!r} cannot be imported from {reference}: {type(error).__name__}: {error}",
                hint="fix or uninstall the plug-in that registers it; `compress doctor` names it",
            ) from error
        if isinstance(function, typer.Typer):
            group = typer.main.get_group(function)
            group.name, group.help = name, group.help or self.references[name].help
            return name, group, remaining
        # A plain function becomes a command of its own application.
        single = typer.Typer(add_completion=False)
        single.command(name)(function)
        return name, typer.main.get_command(single), remaining


app = typer.Typer(
    cls=CommandGroup,
    name="compress",
    help="Make a trained model as small and fast as possible on a target, and measure the file that ships.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=True,
)


@app.callback(invoke_without_command=True)
def _options(version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False) -> None:
    """Handle the options that belong to no command."""
    if version:
        typer.echo(__version__)
        raise typer.Exit


def main() -> None:
    """Run a command. Exit codes: 0 success, 1 limit missed, 2 bad input, 3 failed stage, 130 interrupted."""
    from compress.utils.errors import CompressError

    try:
        app(prog_name="compress")
    except CompressError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except SystemExit as end:
        # typer has turned Ctrl-C into this exit code without a message.
        if end.code == INTERRUPTED:
            typer.echo("Interrupted. Finished stages are kept: the same command continues from there.", err=True)
        raise
