"""Commands of `compress` in this process."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner, Result

from compress.cli import app


def invoke(*arguments: str | Path) -> Result:
    """Run a command; an error that would end the program with a message is raised."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def output_of(*arguments: str | Path) -> str:
    """What a command writes to its standard output when it ends well."""
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout
