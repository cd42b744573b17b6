from __future__ import annotations

import decoders
import pytest


@pytest.fixture
def gpt2(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register GPT-2, whose config uses other field names, stores weights transposed and has no head size."""
    monkeypatch.setitem(decoders.ARCHITECTURES, "GPT2Config", {})
