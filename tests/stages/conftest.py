from __future__ import annotations

import decoders
import pytest


@pytest.fixture
def gpt2(monkeypatch: pytest.MonkeyPatch) -> None:
    """An architecture whose config has other names, whose files have weights transposed, and no size of heads."""
    monkeypatch.setitem(decoders.ARCHITECTURES, "GPT2Config", {})
