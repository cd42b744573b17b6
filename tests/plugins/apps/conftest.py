"""Fixtures of bundle tests: run folders of the toy models and their bundles."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from toy_bundles import WIDTH, wanted_of, write_encoder_run, write_image_run, write_run

from compress.models.sentence_modules import Normalize, SentenceModules
from compress.plugins.apps.build import Bundle, build
from compress.utils.progress import SilentProgress


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the run folder of the toy text classifier."""
    return write_run(tmp_path_factory.mktemp("bundle") / "run")


@pytest.fixture(scope="session")
def bundles(run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """Build an Android bundle of each kind of model, which tests must not modify; Android has the most examples."""
    folder = tmp_path_factory.mktemp("made")
    modules = SentenceModules(WIDTH, steps=(Normalize(),))
    runs = {
        "text": run,
        "image": write_image_run(folder / "image-run"),
        "sentence": write_encoder_run(folder / "sentence-run", modules),
    }
    return {kind: build(wanted_of(run, "android"), folder / kind, SilentProgress()) for kind, run in runs.items()}


@pytest.fixture(scope="session")
def made(bundles: dict[str, Bundle]) -> Bundle:
    """Return the text classifier's bundle, which tests must not modify."""
    return bundles["text"]


@pytest.fixture
def bundle(made: Bundle, tmp_path: Path) -> Path:
    """Return a copy of the bundle's folder that tests may modify."""
    return Path(shutil.copytree(made.folder, tmp_path / "copy"))


@pytest.fixture(scope="session")
def node() -> str:
    """Return the path of Node, or skip the test."""
    path = shutil.which("node")
    if path is None:
        pytest.skip("no node here")
    return path


@pytest.fixture(scope="session")
def npm(node: str) -> None:
    """Skip the test where npm is not installed."""
    if shutil.which("npm") is None:
        pytest.skip("no npm here")
