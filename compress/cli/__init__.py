"""Command line. Importing this imports typer and no command; each command is imported when it is called."""

from __future__ import annotations

import contextlib
import io
import json
import shlex
import signal
import sys
import tempfile
import traceback
from collections.abc import Mapping
from importlib.metadata import distributions
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from compress import DISTRIBUTION, __version__
from compress.plugins import Command, Extension, explain_missing, find_commands

if TYPE_CHECKING:
    from compress.utils.errors import CompressError

INTERRUPTED = 130
CORE_COMMANDS: Mapping[str, Command] = {
    "init": Command(
        "compress.cli.init:init",
        "Write a short recipe for a model and data.",
        "compress init --model sample:minilm --data reviews.csv",
        "Start",
    ),
    "run": Command(
        "compress.cli.run:run",
        "Run a recipe. Finished stages come from the cache.",
        "compress run quickstart --set distill.epochs=2",
        "Start",
    ),
    "check": Command(
        "compress.cli.run:check",
        "Prove that a recipe can run, and predict its time, memory and disk, without loading a model.",
        "compress check quickstart",
        "Start",
    ),
    "inspect": Command(
        "compress.cli.inspect:inspect",
        "Show where a model's bytes and parameters are, by module, type and share.",
        "compress inspect quickstart --depth 2",
        "Inspect",
        isolation="read",
    ),
    "evaluate": Command(
        "compress.cli.evaluate:evaluate",
        "Measure an artifact's metrics, with intervals, through the runtime of a target.",
        "compress evaluate quickstart --by-slice",
        "Compare",
        isolation="run",
    ),
    "bench": Command(
        "compress.cli.bench:bench",
        "Time an artifact on real examples, or as it generates text.",
        "compress bench quickstart --threads 1",
        "Compare",
        isolation="run",
    ),
    "profile": Command(
        "compress.cli.profile:profile",
        "Time every operator, against the arithmetic and bandwidth that this machine reaches.",
        "compress profile quickstart --html profile.html",
        "Inspect",
    ),
    "compare": Command(
        "compress.cli.compare:compare",
        "Compare two runs, or a run's model with its own baseline: better, same, worse, or inconclusive.",
        "compress compare quickstart",
        "Compare",
    ),
    "gate": Command(
        "compress.cli.compare:gate",
        "Judge a run against a baseline by a policy. Exit code 1: something got worse than allowed.",
        "compress gate quickstart --baseline baseline/report.json",
        "Compare",
    ),
    "report": Command(
        "compress.cli.run:report",
        "Show the report of a finished run.",
        "compress report quickstart --format html > report.html",
        "Start",
    ),
    "doctor": Command(
        "compress.cli.doctor:doctor",
        "Check this machine and installation, or a model. Exit code 1: something must be fixed first.",
        "compress doctor quickstart",
        "Inspect",
    ),
    "targets": Command(
        "compress.cli.targets:targets",
        "List the targets, and why some are unavailable on this machine.",
        "compress targets ios",
        "Inspect",
    ),
    "tasks": Command(
        "compress.cli.tasks:tasks",
        "List the tasks, with the columns of their data and their metrics.",
        "compress tasks",
        "Inspect",
    ),
    "recipes": Command(
        "compress.cli.recipes:recipes_app",
        "List recipes, write their JSON Schema, or start a new one.",
        "compress recipes copy quickstart",
        "Inspect",
    ),
    "samples": Command(
        "compress.cli.samples:samples_app",
        "List samples and fetch them into the user's cache folder.",
        "compress samples fetch minilm",
        "Inspect",
    ),
    "verify": Command(
        "compress.cli.verify:verify",
        "Verify a bundle, a run with its provenance, or a registry: every byte and the signature.",
        "compress verify app.zip",
        "Ship",
    ),
    **{
        alias: Command("compress.cli.verify:verify", "Former name of `compress verify`.", hidden=True)
        for alias in ("bundle-verify", "papers-verify")
    },
    "cache": Command(
        "compress.cli.cache:cache_app",
        "List or remove the outputs of finished stages.",
        "compress cache prune --older-than-days 30",
        "Operate",
    ),
}
PANELS = ("Start", "Inspect", "Compare", "Ship", "Operate")
EXAMPLES = """Examples:
compress run quickstart        # run a recipe that is installed with compress
compress check my-recipe.yaml  # check a recipe and its data, and predict time
compress report quickstart --format html > report.html"""


def _example(command: Command) -> str | None:
    return f"Example: {command.example}" if command.example else None


def _shorten_types(parameters: list[Any], context: typer.Context) -> list[Any]:
    """Remove the type of flags from their help, and separate choices by spaces, at which lines may wrap."""
    for parameter in parameters:
        shown = parameter.display_type_rich(context)
        if parameter.metavar is None and getattr(parameter, "is_flag", False):
            parameter.metavar = ""
        elif parameter.metavar is None and "|" in (shown or ""):
            parameter.metavar = shown.strip("<>").replace("|", " | ")
    return parameters


def _shorten_all_types(command: Any, parent: typer.Context) -> Any:
    """Shorten the types in the help of a command and its subcommands, and return the command."""
    context = typer.Context(command, parent=parent)
    _shorten_types(command.get_params(context), context)
    for child in getattr(command, "commands", {}).values():
        _shorten_all_types(child, context)
    return command


_VERBOSITY = {"-q": "quiet", "--quiet": "quiet", "-v": "verbose", "--verbose": "verbose"}
"""Options of `compress` itself that are accepted behind a command too."""


def _take_verbosity(context: typer.Context, command: Any, arguments: list[str]) -> list[str]:
    """Move `-q` and `-v` from a command's arguments to `compress` itself, unless they are the command's own options."""
    commands = [command, *getattr(command, "commands", {}).values()]
    own = {name for each in commands for parameter in each.params for name in parameter.opts}
    end = arguments.index("--") if "--" in arguments else len(arguments)
    moved = [name for name in arguments[:end] if name in _VERBOSITY.keys() - own]
    context.params.update({_VERBOSITY[name]: True for name in moved})
    return [name for name in arguments[:end] if name not in moved] + arguments[end:]


class CommandGroup(TyperGroup):
    """Commands of the core and of the plug-ins, each of which is imported when it is called and not to list it."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.references = {**CORE_COMMANDS, **find_commands(reserved=CORE_COMMANDS)}
        # `compress --help` shows the panels in the order in which their first commands are added.
        ranks = {panel: rank for rank, panel in enumerate(PANELS)}
        in_order = sorted(self.references.items(), key=lambda item: ranks.get(item[1].panel, len(ranks)))
        # `compress --help` and the suggestions for a mistyped name need names and help texts alone.
        for name, command in in_order:
            self.add_command(
                TyperCommand(name, help=command.help, rich_help_panel=command.panel, hidden=command.hidden)
            )

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the options of `compress` itself."""
        return _shorten_types(super().get_params(ctx), ctx)

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
        epilog = _example(self.references[name])
        if isinstance(function, typer.Typer):
            group = typer.main.get_group(function)
            group.name, group.help, group.epilog = name, group.help or self.references[name].help, epilog
            return name, _shorten_all_types(group, ctx), _take_verbosity(ctx, group, remaining)
        # A plain function becomes a command of its own application.
        single = typer.Typer(add_completion=False)
        single.command(name, epilog=epilog)(function)
        command = _shorten_all_types(typer.main.get_command(single), ctx)
        remaining = _take_verbosity(ctx, command, remaining)
        isolation = self.references[name].isolation
        # The context's object says whether to isolate. Without `main`, as in tests, there is none.
        if ctx.obj and isolation is not None and not ctx.resilient_parsing:
            from compress.cli.isolation import isolate_command

            isolate_command(command, remaining, isolation == "run", ctx.params.get("verbose", False))
        return name, command, remaining


app = typer.Typer(
    cls=CommandGroup,
    name="compress",
    help="Make a trained model as small and fast as possible on a target, and measure the file that ships.",
    epilog=EXAMPLES,
    context_settings={"help_option_names": ["--help", "-h"]},
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=True,
)


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show errors and results only.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Also show details, such as each layer.")] = False,
) -> None:
    """Handle the options that belong to no command."""
    from compress.utils.progress import set_verbosity

    set_verbosity(quiet, verbose)
    if version:
        typer.echo(__version__)
        raise typer.Exit


def _fail(error: CompressError) -> NoReturn:
    """Print an error, as JSON too if the command writes JSON, and exit with its code."""
    from compress.utils.terminal import printable

    # Standard output may be what failed.
    with contextlib.suppress(OSError):
        if "--json" in sys.argv or "--format=json" in sys.argv or ("--format", "json") in pairwise(sys.argv):
            typer.echo(json.dumps({"error": error.as_dict()}, indent=2))
    with contextlib.suppress(OSError):
        typer.echo(printable(f"error: {error}"), err=True)
    sys.exit(error.exit_code)


def main(*, isolated: bool = True) -> None:
    """Run a command, and let those that open models of strangers do it in a child process if ``isolated``.

    Exit codes: 0 success, 1 limit missed, 2 bad input, 3 failed stage, 70 a bug of this program, 130 interrupted by
    Ctrl-C or SIGTERM.
    """
    from compress.utils.errors import BugError, CompressError, StorageError, first_line, panics_as_errors

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # for names that the terminal's encoding does not have

    # The modules of the other project lie in the same folder, so either may be broken.
    if any(distributions(name="compress")):
        other = "The unrelated package `compress` is installed too, and its files mix with those of this program"
        typer.echo(f"warning: {other}; pip uninstall compress; pip install --force-reinstall {DISTRIBUTION}", err=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends a command as Ctrl-C does
    try:
        with panics_as_errors():
            app(prog_name="compress", obj=isolated)
    except CompressError as error:
        _fail(error)
    except OSError as error:
        # The disk of the output is full, or its reader is gone.
        _fail(StorageError(f"The operating system refuses: {error.strerror or error}.", where=error.filename))
    except Exception as error:  # noqa: BLE001 - the last place that can say that it is a bug
        from compress.utils.isolation import memory_error

        if (reason := memory_error(error)) is not None:
            _fail(reason)
        with tempfile.NamedTemporaryFile("w", prefix="compress-bug-", suffix=".log", delete=False) as log:
            log.write(f"compress {__version__}: {shlex.join(sys.argv)}\n{traceback.format_exc()}")
        _fail(BugError(f"{type(error).__name__}: {first_line(error)}", where=log.name))
    except SystemExit as end:
        # typer has turned Ctrl-C into this exit code without a message.
        if end.code == INTERRUPTED:
            typer.echo("Interrupted. Finished stages are kept: the same command continues from there.", err=True)
        raise
