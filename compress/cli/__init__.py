"""The command line. Importing this imports typer and nothing heavy; each command imports what it needs."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from compress import __version__
from compress.cli.bench import bench
from compress.cli.cache import cache_app
from compress.cli.compare import compare, gate
from compress.cli.doctor import doctor
from compress.cli.evaluate import evaluate
from compress.cli.inspect import inspect
from compress.cli.profile import profile
from compress.cli.recipes import recipes_app
from compress.cli.report import report
from compress.cli.run import check, run
from compress.cli.samples import samples_app
from compress.cli.targets import targets
from compress.plugins.apps.cli import bundle, bundle_verify
from compress.plugins.devices.cli import devices
from compress.plugins.diff.cli import diff
from compress.plugins.monitoring.ab_command import ab
from compress.plugins.monitoring.drift_command import drift
from compress.plugins.nightly.cli import nightly
from compress.plugins.provenance.cli import papers, papers_verify, push_to_hub
from compress.plugins.search.cli import search

INTERRUPTED = 130


class Later(TyperGroup):
    """The commands of a group, in the module of its name, which is imported once one of them is called."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Their names."""
        self._load()
        return super().list_commands(ctx)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of a name."""
        self._load()
        return super().get_command(ctx, cmd_name)

    def _load(self) -> None:
        if not self.commands:
            found = typer.main.get_command(import_module(f"compress.plugins.{self.name}.cli").app)
            assert isinstance(found, TyperGroup)
            self.commands = found.commands


app = typer.Typer(
    name="compress",
    help="Turn a trained model into the smallest, fastest artifact that still does its job, and prove it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=True,
)
for command in (
    run,
    check,
    search,
    inspect,
    evaluate,
    bench,
    profile,
    compare,
    diff,
    gate,
    drift,
    ab,
    report,
    nightly,
    doctor,
    targets,
    devices,
):
    app.command()(command)
app.command()(bundle)
app.command()(bundle_verify)
app.command()(papers)
app.command()(papers_verify)
app.command()(push_to_hub)
app.add_typer(recipes_app, name="recipes")
app.add_typer(samples_app, name="samples")
app.add_typer(cache_app, name="cache")
app.add_typer(
    typer.Typer(cls=Later, help="Versions of models: register, promote behind a gate, roll back, verify, pull."),
    name="registry",
)


def _version(show: bool) -> None:
    if show:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """What every command takes."""


def main() -> None:
    """Run a command. Exit codes: 0 well, 1 a limit missed, 2 bad input, 3 a stage failed, 130 interrupted."""
    from compress.utils.errors import CompressError

    try:
        app(prog_name="compress")
    except CompressError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except SystemExit as end:
        # typer has turned Ctrl-C into this exit code and said nothing.
        if end.code == INTERRUPTED:
            typer.echo("Interrupted. What was finished is kept: the same command goes on from there.", err=True)
        raise
