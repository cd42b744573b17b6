"""Fixtures of a sample pinned to a small package file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from small_package import OTHERS, RecordingProgress, movie_lines, pinned_to, write_package

from compress.data.samples.sample import Sample, find_sample


@pytest.fixture
def progress() -> RecordingProgress:
    return RecordingProgress()


@pytest.fixture
def package(tmp_path: Path) -> Path:
    path = tmp_path / "vaderSentiment-0.5.zip"
    write_package(path, {"movieReviewSnippets_GroundTruth.txt": movie_lines(), **OTHERS})
    return path


@pytest.fixture
def sample_of(package: Path) -> Callable[[str], Sample]:
    """Return a function from a sample's name to that sample, pinned to the small package file."""
    return lambda name: pinned_to(find_sample(name), package)
