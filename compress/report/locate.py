"""Finding the report that a person means."""

from __future__ import annotations

from pathlib import Path

from compress.errors import InputError

RUNS = Path("artifacts") / "runs"


def find_report(run: Path, runs: Path = RUNS) -> Path:
    """The report.json of a run's folder, of a file, or of a recipe's latest run. Raises `InputError`."""
    if run.is_file() and run.suffix not in {".yaml", ".yml"}:
        return run
    named = runs / (run.stem if run.suffix in {".yaml", ".yml"} else run)
    places = [run / "report.json", run / "latest" / "report.json"]
    if not run.is_absolute():
        places += [named / "latest" / "report.json", named / "report.json"]
    for place in places:
        if place.is_file():
            return place
    raise InputError(
        f"There is no report of {str(run)!r}.",
        where=", ".join(map(str, places)),
        expected="a run's folder, its report.json, or the name of a recipe that was run",
        mend=f"run it first (compress run RECIPE){_known(runs)}",
    )


def _known(runs: Path) -> str:
    names = sorted(path.parent.name for path in runs.glob("*/latest")) if runs.is_dir() else []
    return f", or name one of: {', '.join(names)}" if names else ""
