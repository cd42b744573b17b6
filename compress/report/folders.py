"""Folders named after the time they were begun, with a link to the latest beside them."""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path

LATEST = "latest"


def new_folder(parent: Path, started: datetime) -> Path:
    """A folder named after the time, made by this process alone."""
    stamp = started.strftime("%Y-%m-%dT%H-%M-%S")
    for attempt in range(1000):
        folder = parent / (stamp if attempt == 0 else f"{stamp}-{attempt}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            if not parent.is_dir():
                raise
            continue
        return folder
    raise AssertionError("a thousand folders in one second")


def point_latest(folder: Path) -> None:
    """Turn the link `latest` to ``folder`` in one step."""
    link = folder.parent / f".{LATEST}-{os.getpid()}"
    link.unlink(missing_ok=True)
    link.symlink_to(folder.name)
    link.replace(folder.parent / LATEST)
