"""Fixtures of the diffusion tests; bundle tests are skipped if the plug-in apps is not installed."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from compress.plugins.diffusion.pipeline_model import GeneratorModel

collect_ignore_glob = [] if find_spec("compress.plugins.apps") else ["test_bundle_*.py"]


@pytest.fixture(scope="session")
def generator(tmp_path_factory: pytest.TempPathFactory) -> GeneratorModel:
    """Return a tiny pipeline, which tests must not modify."""
    from tiny_pipelines import pipeline_folder

    from compress.plugins.diffusion.pipeline_model import load_pipeline

    return load_pipeline(pipeline_folder(tmp_path_factory.mktemp("pipeline")))
