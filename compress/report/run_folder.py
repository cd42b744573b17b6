"""Folders of runs, named after their start: a link to the latest, atomic writing, and finding a report.

Nothing here imports the pipeline: `compress compare` reads old runs with these functions alone.
"""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from compress.data.files import parquet_columns
from compress.utils.errors import InputError, StorageError

NAME = "%Y-%m-%dT%H-%M-%S"
"""Name of a run's folder, by the time of its start."""
LATEST = "latest"
REPORT, RECIPE, LOCK = "report.json", "recipe.yaml", "lock.json"
"""Files of a run's folder that describe it."""
MODEL, TARGETS = "model", "targets"
"""Folders of a run that ship: its model, and each target's model in another format."""


def create_run_folder(parent: Path, started: datetime) -> Path:
    """Create a folder named after the time, which no other process creates."""
    name = started.strftime(NAME)
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


def update_latest_link(folder: Path) -> None:
    """Point the link `latest` to ``folder`` atomically."""
    link = folder.parent / f".{LATEST}-{os.getpid()}"
    link.unlink(missing_ok=True)
    link.symlink_to(folder.name)
    link.replace(folder.parent / LATEST)


def shipped_files(folder: Path) -> list[str]:
    """Return the paths, relative to a run's folder, of every shipped file. Raises `InputError` for a link outside."""
    paths = [path for subfolder in (MODEL, TARGETS) for path in (folder / subfolder).rglob("*") if path.is_file()]
    require_inside(folder, paths)
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def require_inside(folder: Path, paths: Iterable[Path]) -> None:
    """Raise `InputError` for a link to a file outside ``folder``, which would be copied or sent with the others."""
    root = folder.resolve()
    for path in paths:
        if not path.resolve().is_relative_to(root):
            raise InputError(
                f"{path.relative_to(folder)} is a link to a file outside the folder.",
                where=str(path),
                expected="files of the folder itself, as `compress run` writes them",
                hint="remove the link, or put the file in its place",
            )


RUNS = Path("artifacts") / "runs"


def find_report(run: Path, runs: Path = RUNS) -> Path:
    """Return the report.json of a run's folder, of a file, or of a recipe's latest run. Raises `InputError`."""
    if run.is_file() and run.suffix not in {".yaml", ".yml"}:
        return run
    recipe_folder = runs / (run.stem if run.suffix in {".yaml", ".yml"} else run)
    candidates = [run / REPORT, run / LATEST / REPORT]
    if not run.is_absolute():
        candidates += [recipe_folder / LATEST / REPORT, recipe_folder / REPORT]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    if (unfinished := unfinished_run(run, runs)) is not None:
        raise InputError(
            f"The run of {run.stem} has no report yet: it was interrupted, failed, or still runs.",
            where=str(unfinished),
            hint="repeat the same `compress run`: it continues after the last finished stage. run.log there says more",
        )
    names = finished_runs(runs)
    alternatives = f", or name one of: {', '.join(names)}" if names else ""
    raise InputError(
        f"There is no report of {str(run)!r}.",
        where=", ".join(map(str, candidates)),
        expected="a run's folder, its report.json, or the name of a recipe that was run",
        hint=f"run it first (compress run RECIPE){alternatives}",
    )


def finished_runs(runs: Path = RUNS) -> list[str]:
    """Return the names of the recipes with a finished run."""
    return sorted(path.parent.name for path in runs.glob(f"*/{LATEST}")) if runs.is_dir() else []


def unfinished_run(run: Path, runs: Path = RUNS) -> Path | None:
    """Return the newest folder of a recipe's runs if it has no report: the run was interrupted, failed, or goes on."""
    folder = run if run.is_dir() else runs / run.stem
    newest = max((path for path in folder.glob("2*") if path.is_dir()), default=None, key=lambda path: path.name)
    return newest if newest is not None and not (newest / REPORT).is_file() else None


def model_folder(path: Path) -> Path | None:
    """Return the model folder of a run's folder, of a recipe's latest run, or at the path itself; None without any."""
    folders = (path / MODEL, path / LATEST / MODEL, path, RUNS / path / LATEST / MODEL)
    return next((folder for folder in folders if (folder / "config.json").is_file()), None)


def write_atomically(path: Path, content: str | bytes, what: str = "report") -> None:
    """Write a temporary file beside ``path`` and rename it. Raises `StorageError`, which names ``what`` failed."""
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = Path(file.name)
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise StorageError(
            f"The {what} cannot be written: {error.strerror or error}",
            where=str(path),
            expected="a folder on a disk with room for it",
            hint="free some space, then run again: finished stages are cached",
        ) from error


PREDICTIONS = "predictions.parquet"


@dataclass(frozen=True, eq=False)
class ModelAnswers:
    """Answers of a model to the rows of a split, with their probabilities [n] and correctness [n]."""

    answers: Sequence[str]
    probability: np.ndarray
    correct: np.ndarray


@dataclass(frozen=True, eq=False)
class StoredPredictions:
    """Label of each row, and one model's answers, as read from the file."""

    labels: Sequence[str]
    answers: ModelAnswers


def column_prefix(model: str, target: str, several: bool) -> str:
    """Return the prefix of a model's columns: its label, after the target if the run measured on several."""
    return f"{target}.{model}" if several else model


def write_predictions(
    labels: Sequence[str], answers: Mapping[tuple[str, str], ModelAnswers], folder: Path, several: bool
) -> None:
    """Write the file atomically: `row`, `label`, and `MODEL.answer`, `.probability` and `.correct`.

    Args:
        labels: Label of each row.
        answers: Answers by (model, target).
        folder: Folder of the run.
        several: Whether there are several targets. Columns are then `TARGET.MODEL.answer` and so on.

    Raises:
        StorageError: The file cannot be written.
    """
    columns: dict[str, pa.Array] = {
        "row": pa.array(np.arange(len(labels), dtype=np.int32)),
        "label": pa.array(labels, pa.string()).dictionary_encode(),
    }
    for (model, target), model_answers in answers.items():
        prefix = column_prefix(model, target, several)
        columns[f"{prefix}.answer"] = pa.array(model_answers.answers, pa.string()).dictionary_encode()
        columns[f"{prefix}.probability"] = pa.array(model_answers.probability.astype(np.float32))
        columns[f"{prefix}.correct"] = pa.array(model_answers.correct.astype(bool))
    content = io.BytesIO()
    pyarrow.parquet.write_table(pa.table(columns), content)
    write_atomically(folder / PREDICTIONS, content.getvalue(), "table of predictions")


def read_predictions(folder: Path, model: str, target: str) -> StoredPredictions:
    """Return the answers of ``model`` in the run of ``folder``. Raises `InputError` if they are unavailable."""
    path = folder / PREDICTIONS
    try:
        names = pyarrow.parquet.read_schema(path).names
        prefixes = [column_prefix(model, target, several) for several in (True, False)]
        prefix = next((candidate for candidate in prefixes if f"{candidate}.answer" in names), None)
        if prefix is None:
            raise InputError(f"{PREDICTIONS} has no predictions of {model} on {target}.", where=str(path))
        selected = ["label", *(f"{prefix}.{part}" for part in ("answer", "probability", "correct"))]
        if missing := {*selected} - {*names}:
            raise InputError(f"{PREDICTIONS} has no column {min(missing)!r}.", where=str(path))
        columns = parquet_columns(path, selected)[2]
    except FileNotFoundError:
        raise InputError(f"There is no {PREDICTIONS}.", where=str(folder), expected="a folder of a run") from None
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{PREDICTIONS} cannot be read: {error}", where=str(path)) from None
    answers = ModelAnswers(
        columns[f"{prefix}.answer"],
        np.array(columns[f"{prefix}.probability"], dtype=np.float64),
        np.array(columns[f"{prefix}.correct"], dtype=bool),
    )
    return StoredPredictions(columns["label"], answers)
