"""Folders of runs, named after the time they began: a link to the latest, files written whole, finding a report."""

from __future__ import annotations

import os
import tempfile
from datetime import datetime
from pathlib import Path

from compress.utils.errors import InputError, StorageError

LATEST = "latest"
REPORT, RECIPE, LOCK = "report.json", "recipe.yaml", "lock.json"
"""What a run says of itself, in its folder."""
MODEL, TARGETS = "model", "targets"
"""Folders with what it ships: its model, and what each target got in a format of its own."""


def new_folder(parent: Path, started: datetime) -> Path:
    """A folder named after the time, made by this process alone."""
    name = stamp(started)
    for attempt in range(1000):
        folder = parent / (name if attempt == 0 else f"{name}-{attempt}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            if not parent.is_dir():
                raise
            continue
        return folder
    raise AssertionError("a thousand folders in one second")


def stamp(started: datetime) -> str:
    """The time as a folder's name."""
    return started.strftime("%Y-%m-%dT%H-%M-%S")


def point_latest(folder: Path) -> None:
    """Turn the link `latest` to ``folder`` in one step."""
    link = folder.parent / f".{LATEST}-{os.getpid()}"
    link.unlink(missing_ok=True)
    link.symlink_to(folder.name)
    link.replace(folder.parent / LATEST)


def shipped(folder: Path) -> list[str]:
    """Paths below a run's folder of every file that ships."""
    paths = (path for home in (MODEL, TARGETS) for path in (folder / home).rglob("*") if path.is_file())
    return sorted(path.relative_to(folder).as_posix() for path in paths)


RUNS = Path("artifacts") / "runs"


def find_report(run: Path, runs: Path = RUNS) -> Path:
    """The report.json of a run's folder, of a file, or of a recipe's latest run. Raises `InputError`."""
    if run.is_file() and run.suffix not in {".yaml", ".yml"}:
        return run
    named = runs / (run.stem if run.suffix in {".yaml", ".yml"} else run)
    places = [run / REPORT, run / LATEST / REPORT]
    if not run.is_absolute():
        places += [named / LATEST / REPORT, named / REPORT]
    for place in places:
        if place.is_file():
            return place
    raise InputError(
        f"There is no report of {str(run)!r}.",
        where=", ".join(map(str, places)),
        expected="a run's folder, its report.json, or the name of a recipe that was run",
        hint=f"run it first (compress run RECIPE){_known(runs)}",
    )


def _known(runs: Path) -> str:
    names = sorted(path.parent.name for path in runs.glob("*/latest")) if runs.is_dir() else []
    return f", or name one of: {', '.join(names)}" if names else ""


def write_whole(path: Path, content: str | bytes, what: str = "report") -> None:
    """Write beside ``path`` and rename into place. Raises `StorageError`, saying ``what`` could not be written."""
    beside: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            beside = Path(file.name)
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        beside.chmod(0o644)
        beside.replace(path)
    except OSError as error:
        if beside is not None:
            beside.unlink(missing_ok=True)
        raise StorageError(
            f"The {what} cannot be written: {error.strerror or error}",
            where=str(path),
            expected="a folder on a disk with room for it",
            hint="free some space, then run again: finished stages are cached",
        ) from error
