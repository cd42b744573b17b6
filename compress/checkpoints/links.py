"""Putting a file into another folder without writing its bytes again, where the file system can."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def link_or_copy(source: Path, target: Path) -> None:
    """Give the file that ``source`` is, links followed, the name ``target`` as well; copy it where that can't be."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)
