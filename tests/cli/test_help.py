"""Tests of help texts: panels, examples and widths."""

from __future__ import annotations

import re
import shlex

import pytest
import typer
from typer.testing import CliRunner

from compress.cli import CommandGroup, app

ROOT = typer.main.get_command(app)
assert isinstance(ROOT, CommandGroup)
REFERENCES = ROOT.references
VISIBLE = {name: command for name, command in REFERENCES.items() if not command.hidden}


def help_lines(*arguments: str) -> list[str]:
    """Return the lines of a help text at 80 columns."""
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"})
    assert result.exit_code == 0, result.output
    return result.output.splitlines()


def panels() -> dict[str, list[str]]:
    """Return the commands of each panel of `compress -h`, in order."""
    commands: dict[str, list[str]] = {}
    for line in help_lines("-h"):
        if title := re.match("╭─ (.+?) ─", line):
            commands[title[1]] = []
        elif command := re.match("│ ([a-z][a-z-]*) ", line):
            commands[list(commands)[-1]].append(command[1])
    return commands


def test_commands_are_in_panels_by_purpose() -> None:
    shown = panels()
    assert list(shown) == ["Options", "Start", "Inspect", "Compare", "Ship", "Operate"]
    assert {"check", "run", "search", "report"} <= set(shown["Start"])
    assert set(shown["Compare"]) == {"compare", "diff", "evaluate", "bench", "gate"}
    assert set(shown["Operate"]) == {"nightly", "drift", "ab", "devices", "cache"}
    assert sorted(name for commands in shown.values() for name in commands) == sorted(VISIBLE)


def test_help_ends_with_three_commands() -> None:
    lines = [line.strip() for line in help_lines("-h") if line.strip()]
    assert lines[-4] == "Examples:"
    assert all(line.startswith("compress ") for line in lines[-3:])


def leaves() -> list[tuple[str, ...]]:
    """Return the names of all commands, with those of groups in front of their subcommands."""
    names: list[tuple[str, ...]] = []
    for name in VISIBLE:
        _, command, _ = ROOT.resolve_command(typer.Context(ROOT), [name])
        names += [(name,), *((name, child) for child in getattr(command, "commands", ()))]
    return names


@pytest.mark.parametrize("names", leaves(), ids=" ".join)
def test_short_help_option_shows_an_example_that_the_command_accepts(names: tuple[str, ...]) -> None:
    text = " ".join(" ".join(help_lines(*names, "-h")).split())
    program, *arguments = shlex.split(text.partition("Example: ")[2].partition(" > ")[0])
    assert program == "compress" and tuple(arguments[: len(names)]) == names
    parent, current = typer.Context(ROOT), ROOT
    while hasattr(current, "commands") and arguments:
        called, current, arguments = current.resolve_command(parent, arguments)
        # An unknown option or a missing argument raises a UsageError.
        parent = current.make_context(called, arguments, parent=parent)


@pytest.mark.parametrize("name", VISIBLE)
def test_flags_have_no_type_and_choices_wrap_between_words(name: str) -> None:
    words = " ".join(help_lines(name, "--help")).split()
    assert "<bool>" not in words
    _, command, _ = ROOT.resolve_command(typer.Context(ROOT), [name])
    choices = {choice for parameter in command.params for choice in parameter.type_descriptor.choices or ()}
    assert choices <= set(words)
