"""Tests of columns whose chunks are in a temporary file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

import compress.data.column_values as column_values
from compress.data.files import read_file


def test_large_columns_are_stored_in_a_file_with_all_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(column_values, "IN_MEMORY_BYTES", 0)
    texts = [f"text {number} é" * 20 for number in range(30_000)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text, "tags": [1]}) + "\n" for text in texts))
    before = pa.total_allocated_bytes()
    columns = read_file(tmp_path / "a.jsonl", {"text", "tags"}).columns
    assert pa.total_allocated_bytes() - before < 100_000, "the strings take 8 MB"
    assert columns == {"text": texts, "tags": [[1]] * len(texts)}
    assert columns["text"][25_000] == texts[25_000] and not list((tmp_path / "compress" / "rows").iterdir())


@pytest.mark.parametrize("step", [1, 7])
def test_rows_are_taken_from_several_chunks(step: int) -> None:
    table = pa.table({"a": pa.chunked_array([[0, 1, 2], list(range(3, 2000))])})
    indices = np.arange(1, 2000, step)
    assert column_values.take_rows(table, indices)["a"].to_pylist() == indices.tolist()
