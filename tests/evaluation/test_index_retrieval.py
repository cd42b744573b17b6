"""Tests of retrieval from an existing index: its files, the check of its vectors, and recall by brute force."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import ndcg_score

from compress.data.vector_index import VectorIndex, read_index
from compress.evaluation.index_retrieval import Corpus, check_index, find_corpus, index_rows
from compress.numerics.embeddings import normalized, to_ubinary
from compress.utils.errors import DataError

COUNT, DIMENSIONS = 60, 24
RNG = np.random.default_rng(3)
VECTORS = normalized(RNG.standard_normal((COUNT, DIMENSIONS)).astype(np.float32))
TEXTS = tuple(f"document {number}" for number in range(COUNT))
QUERIES = normalized(VECTORS + 0.5 * RNG.standard_normal(VECTORS.shape).astype(np.float32))


def write(path: Path, embeddings: pa.Array | Sequence[Sequence[float]], texts: Sequence[str] = TEXTS) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": texts, "embedding": embeddings}), path)
    else:
        rows = [{"text": text, "embedding": list(vector)} for text, vector in zip(texts, embeddings, strict=True)]
        path.write_text("\n".join(map(json.dumps, rows)))
    return path


def embed(texts: Sequence[str]) -> np.ndarray:
    return VECTORS[[TEXTS.index(text) for text in texts]]


def test_precision_of_index_follows_from_its_numbers(tmp_path: Path) -> None:
    exact = read_index(write(tmp_path / "a.parquet", pa.array(VECTORS.tolist(), pa.list_(pa.float32()))))
    assert exact.precision == "float" and np.array_equal(exact.vectors, VECTORS)
    assert exact.texts == TEXTS

    integers = np.round(127 * VECTORS / np.abs(VECTORS).max()).astype(int)
    stored = read_index(write(tmp_path / "b.jsonl", integers.tolist()))
    assert stored.precision == "int8" and np.array_equal(stored.vectors, integers)

    bits = read_index(write(tmp_path / "c.parquet", pa.array(to_ubinary(VECTORS).tolist(), pa.list_(pa.uint8()))))
    assert bits.precision == "ubinary"
    assert np.array_equal(bits.signs(DIMENSIONS) > 0, VECTORS > 0)
    for index in (exact, stored, bits):
        check_index(index, embed)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rows: rows[7].update(embedding=[1.0]), "row 8|:8"),
        (lambda rows: rows[7].update(embedding="0.1,0.2"), "list of finite numbers"),
        (lambda rows: rows[7].update(embedding=[None] * DIMENSIONS), "no numbers"),
        (lambda rows: rows[7].update(embedding=[float("inf")] * DIMENSIONS), "no numbers"),
        (lambda rows: rows[7].update(text=" "), "text is empty"),
        (lambda rows: rows.__delitem__(slice(10, None)), "10 rows"),
        (lambda rows: [row.update(embedding=[300, -300]) for row in rows], "integers from -300 to 300"),
        (lambda rows: [row.pop("embedding") for row in rows], "no column 'embedding'"),
    ],
)
def test_invalid_index_is_refused(tmp_path: Path, change: Callable[[list[dict[str, Any]]], object], words: str) -> None:
    rows = [{"text": text, "embedding": vector.tolist()} for text, vector in zip(TEXTS, VECTORS, strict=True)]
    change(rows)
    path = tmp_path / "index.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match=words):
        read_index(path)


def test_vectors_of_another_model_are_refused() -> None:
    others = normalized(np.random.default_rng(8).standard_normal(VECTORS.shape).astype(np.float32))
    with pytest.raises(DataError, match="does not hold the baseline's vectors"):
        check_index(VectorIndex(TEXTS, others, "float"), embed)
    with pytest.raises(DataError, match="share of equal bits"):
        check_index(VectorIndex(TEXTS, to_ubinary(others), "ubinary"), embed)
    with pytest.raises(DataError, match="have 12 numbers"):
        check_index(VectorIndex(TEXTS, VECTORS[:, :12], "float"), embed)
    # As from sentence-transformers, whose int8 has a range per dimension.
    span = VECTORS.max(axis=0) - VECTORS.min(axis=0)
    skewed = np.floor((VECTORS - VECTORS.min(axis=0)) / span * 255) - 128 + 40 * (np.arange(DIMENSIONS) % 2)
    with pytest.raises(DataError, match="one scale for all dimensions"):
        check_index(VectorIndex(TEXTS, skewed.astype(np.float32), "int8"), embed)


def test_recall_and_ndcg_equal_brute_force_and_scikit_learn() -> None:
    # The index has documents that no query asks for, and lists the relevant ones in another order and case.
    pairs = [f"Document  {number}" for number in range(20)]
    order = np.random.default_rng(1).permutation(COUNT)
    index = VectorIndex(tuple(TEXTS[row] for row in order), VECTORS[order], "float")
    corpus = find_corpus(index, pairs, np.arange(20), DIMENSIONS)
    rows = {row.metric: row for row in index_rows(QUERIES[:20], np.arange(20), corpus, "m", "t")}

    scores = QUERIES[:20] @ VECTORS.T
    found = [int((scores[row] > scores[row, row]).sum()) + 1 for row in range(20)]
    assert 0 < rows["index_recall_at_1"].value < rows["index_recall_at_10"].value
    assert rows["index_recall_at_10"].raw == tuple(float(rank <= 10) for rank in found)
    assert rows["index_recall_at_1"].raw == tuple(float(rank == 1) for rank in found)
    relevance = np.eye(COUNT)[:20]
    assert rows["index_ndcg_at_10"].value == pytest.approx(ndcg_score(relevance, scores, k=10))


def test_binary_index_is_searched_by_bits() -> None:
    index = VectorIndex(TEXTS, to_ubinary(VECTORS), "ubinary")
    corpus = find_corpus(index, TEXTS, np.arange(COUNT), DIMENSIONS)
    (found, *_) = index_rows(QUERIES, np.arange(COUNT), corpus, "m", "t")
    exact = Corpus(VECTORS, np.arange(COUNT))
    simulated = {row.metric: row for row in index_rows(QUERIES, np.arange(COUNT), exact, "m", "t", quantized=True)}
    assert found.raw == simulated["index_recall_at_10_binary"].raw
    assert found.value < 1


def test_missing_relevant_texts_are_counted() -> None:
    index = VectorIndex(TEXTS, VECTORS, "float")
    with pytest.raises(DataError, match="1 of 2 relevant texts are not in the index, such as 'nowhere'"):
        find_corpus(index, ["document 3", "Nowhere"], np.arange(2), DIMENSIONS)
