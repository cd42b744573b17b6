from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
LABELS = np.tile(np.arange(40), 2)


def embeddings(noise: float, seed: int = 0) -> np.ndarray:
    """Texts and pairs that lie near each other, in a space of which four dimensions matter."""
    generator = np.random.default_rng(seed)
    meant = np.concatenate([generator.normal(size=(40, 4)), np.zeros((40, 12))], axis=1)
    turn = np.linalg.qr(np.random.default_rng(9).normal(size=(16, 16)))[0]
    both = np.concatenate([meant, meant + np.pad(generator.normal(size=(40, 4)) * noise, ((0, 0), (0, 12)))])
    turned: np.ndarray = (both @ turn).astype(np.float32)
    return turned / np.linalg.norm(turned, axis=1, keepdims=True)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("embedding_index")


def test_the_rotation_finds_the_dimensions_that_matter(bench: Any) -> None:
    rows = bench.measure(embeddings(0.1, seed=1), embeddings(0.1), LABELS, [8, 4, 1])
    assert [row["dimensions"] for row in rows] == [16, 8, 4, 1]
    assert rows[0]["recall_at_10"] == rows[2]["recall_at_10"] > rows[3]["recall_at_10"]
    assert rows[2]["kept_share"] > 0.999 > rows[3]["kept_share"]
