"""Fixtures of monitoring tests: a tiny run, and commands executed in this process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_use import Done, write_run

from compress.cli import main


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a tiny run, which tests must not modify."""
    return write_run(tmp_path_factory.mktemp("use") / "a")


@pytest.fixture
def compress(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Return a function that runs a command in this process."""

    def call(*arguments: str | Path) -> Done:
        monkeypatch.setenv("COLUMNS", "160")
        monkeypatch.setattr(sys, "argv", ["compress", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            main(isolated=False)
        return Done(int(end.value.code or 0), *capfd.readouterr())

    return call
