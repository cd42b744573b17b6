"""Fixtures of command-line tests: a disposable recipe folder, and commands run in this process."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import pytest

from compress.cli import main
from compress.pipeline.cache import Cache

Done: TypeAlias = "subprocess.CompletedProcess[str]"


@pytest.fixture
def place(pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy the folder of the test file's own fixture ``pristine``, make the copy the current folder and return it."""
    shutil.copytree(pristine, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "place"


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Return a function that runs a command in a folder in this process, since starting a new one takes seconds."""

    def call(*arguments: str | Path, folder: Path) -> Done:
        monkeypatch.chdir(folder)
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setattr(sys, "argv", ["compress", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            main(isolated=False)
        return subprocess.CompletedProcess(sys.argv, int(end.value.code or 0), *capfd.readouterr())

    return call


@pytest.fixture
def refuse(place: Path, here: Callable[..., Done]) -> Callable[..., str]:
    """Return a function that runs a command in ``place``, checks that it fails with ``code`` and returns its error.

    The failed command must leave neither a report nor partial cache entries, and exactly ``done`` finished stages.
    """

    def call(*arguments: str, code: int = 2, done: int = 0) -> str:
        ended = here(*arguments, folder=place)
        assert (ended.returncode, ended.stdout) == (code, ""), ended.stderr
        assert "Traceback" not in ended.stderr and ended.stderr.count("error: ") == 1
        cache = Cache(place / "artifacts" / "cache")
        if cache.root.is_dir():
            assert (len(cache.entries()), cache.remove_partial()) == (done, 0)
        assert list(place.glob("artifacts/runs/*/latest")) == []
        assert list(place.glob("artifacts/runs/*/*/report.json")) == []
        return ended.stderr[ended.stderr.index("error: ") :]

    return call
