"""Writing a report and its views into the folder of a run."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from compress.errors import StorageError
from compress.report.pages import html_page, markdown_report
from compress.report.schema import Report


def write_report(report: Report, folder: Path) -> None:
    """Write report.json, report.md and report.html, each whole or not at all. Raises `StorageError`."""
    contents = {
        "report.json": report.to_json(),
        "report.md": markdown_report(report),
        "report.html": html_page(report),
    }
    for name, content in contents.items():
        write_whole(folder / name, content)


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
            mend="free some space, then run again: finished stages are cached",
        ) from error
