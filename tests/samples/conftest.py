"""A sample pinned to a small package file, and a progress that remembers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from small_package import OTHERS, movie_lines, pinned_to, write_package

from compress.samples.catalog import SAMPLES
from compress.samples.sample import Sample


class RecordingProgress:
    """Remembers notes, and the steps of each bar."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.steps: dict[str, tuple[int, int]] = {}

    def track(self, items: Iterable[Any], description: str, total: int) -> Iterator[Any]:
        count = 0
        for item in items:
            count += 1
            yield item
        self.steps[description] = (count, total)

    def note(self, message: str) -> None:
        self.notes.append(message)


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
    """A sample of the catalogue, pinned to the small package file instead of the real one."""
    return lambda name: pinned_to(SAMPLES[name], package)
