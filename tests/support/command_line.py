"""Commands of `compress`, run in the test process."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner, Result

from compress.cli import app


def invoke(*arguments: str | Path) -> Result:
    """Run a command, and let an error propagate that the program would report with a message."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def output_of(*arguments: str | Path) -> str:
    """Return what a command writes to standard output, after a check that its exit code is 0."""
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout
