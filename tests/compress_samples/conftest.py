"""Fixture of a progress that records its calls."""

from __future__ import annotations

import pytest
from small_package import RecordingProgress


@pytest.fixture
def progress() -> RecordingProgress:
    return RecordingProgress()
