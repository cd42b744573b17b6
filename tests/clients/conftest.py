"""Fixtures that install client libraries once per user."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

PACKAGE = "@huggingface/transformers"
VERSION = "4.3.1"


@pytest.fixture(scope="session")
def library() -> Path:
    """Return the entry file of transformers.js, installed without running any install script."""
    if shutil.which("npm") is None or shutil.which("node") is None:
        pytest.skip("no node and npm here")
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    home = cache / "compress" / "tests" / f"transformers-js-{VERSION}"
    entry = home / "node_modules" / PACKAGE / "dist" / "transformers.node.mjs"
    if not entry.exists():
        home.mkdir(parents=True, exist_ok=True)
        flags = ["--ignore-scripts", "--no-audit", "--no-fund", "--silent"]
        subprocess.run(["npm", "install", *flags, f"{PACKAGE}@{VERSION}"], cwd=home, check=True, timeout=900)
    return entry
