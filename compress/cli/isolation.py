"""Limits of the child process in which a command opens models, decided by its command line."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import typer

from compress.utils.environment import memory_bytes, memory_limit_bytes
from compress.utils.errors import InputError
from compress.utils.isolation import CPU_VARIABLE, MEMORY_VARIABLE, NETWORK_VARIABLE, Limits, current_limits, isolate

FETCHED_TARGETS = ("browser", "browser-webgpu", "node")
"""Targets whose runtime is fetched when it is first used."""
_NETWORK_OPTIONS = ("device", "recipe")
"""Options that name another machine, or a recipe of the user that may name data on the Hub."""
_READ_SECONDS, _READ_SECONDS_PER_GB = 60, 60
_RUN_SECONDS_PER_CORE = 24 * 60 * 60


def isolate_command(command: Any, arguments: list[str], runs_models: bool, verbose: bool) -> None:
    """Go on in a child process whose limits fit a command line.

    Args:
        command: The command.
        arguments: Its arguments.
        runs_models: Whether the command runs models, and not only reads files.
        verbose: Whether the limits that are in force are shown.
    """
    # Mistakes in the arguments are left to the child.
    values = command.make_context(command.name, list(arguments), resilient_parsing=True).params
    models = [values.get(option.name) for option in command.params if option.param_type_name == "argument"]
    names = [str(name) for name in (*models, values.get("baseline")) if name is not None]
    isolate(", ".join(names), choose_limits(names, values, runs_models))
    if verbose:
        typer.echo(f"limits of this process: {current_limits()}", err=True)


def choose_limits(names: list[str], values: dict[str, Any], runs_models: bool) -> Limits:
    """Return the limits for models of these names and options of these values."""
    memory = _number(MEMORY_VARIABLE, 1e9)
    if memory is None:
        memory = min(filter(None, (memory_bytes(), memory_limit_bytes())), default=None)
    paths = [Path(name) for name in names]
    sizes = None if runs_models or not all(path.exists() for path in paths) else sum(map(_size, paths))
    seconds = _number(CPU_VARIABLE, 1)
    if seconds is None:
        reading = None if sizes is None else _READ_SECONDS + math.ceil(sizes / 1e9 * _READ_SECONDS_PER_GB)
        seconds = reading or _RUN_SECONDS_PER_CORE * (os.cpu_count() or 1)
    return Limits(
        memory_bytes=memory,
        # Runtimes of graphics cards and of browsers reserve terabytes of addresses.
        address_bytes=None if memory is None or sizes is None else memory + sizes,
        cpu_seconds=seconds,
        network=needs_network(names, values),
    )


def needs_network(names: list[str], values: dict[str, Any]) -> bool:
    """Return whether a command line names something that may have to be fetched, or another machine."""
    return (
        os.environ.get(NETWORK_VARIABLE) == "1"
        or any(values.get(option) for option in _NETWORK_OPTIONS)
        or values.get("target") in FETCHED_TARGETS
        or any(name.startswith("sample:") or "://" in name for name in names)
    )


def _number(variable: str, unit: float) -> int | None:
    """Return the number of an environment variable in ``unit``, or None. Raises `InputError`."""
    text = os.environ.get(variable)
    if not text:
        return None
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise InputError(f"{variable} is {text!r}.", where=variable, expected="a positive number, such as 64")
    return math.ceil(number * unit)


def _size(path: Path) -> int:
    """Return the bytes of a file, or of all files of a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
