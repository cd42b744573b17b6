"""The toy classifier's run and its bundle, made once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from toy_bundles import wanted_of, write_run

from compress.bundle.build import Bundle, build
from compress.progress import SilentProgress


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's folder."""
    return write_run(tmp_path_factory.mktemp("bundle") / "run")


@pytest.fixture(scope="session")
def made(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Its bundle for Android, which has the most examples; not to be changed."""
    return build(wanted_of(run, "android"), tmp_path_factory.mktemp("made") / "toy", SilentProgress())


@pytest.fixture
def bundle(made: Bundle, tmp_path: Path) -> Path:
    """A copy of its folder, to be changed."""
    return Path(shutil.copytree(made.folder, tmp_path / "copy"))
