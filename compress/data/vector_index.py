"""Vectors that an existing index stores: one row per document, with its text and its embedding."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeGuard

import numpy as np

from compress.data.files import Rows
from compress.data.source import find_file, read_columns
from compress.utils.errors import DataError

BASELINE_INDEX = "baseline"
"""Value of `evaluation.index` for an index that the baseline would fill with the documents of the split."""
_COLUMNS = ("text", "embedding")
_ROWS = 11
"""Number of documents of which ten can be nearer than the relevant one."""
Precision = Literal["float", "int8", "ubinary"]


@dataclass(frozen=True, eq=False)
class VectorIndex:
    """Documents of an index: ``texts[i]`` has the embedding ``vectors[i]``.

    ``vectors`` are [documents, dimensions] float32 for `float` and `int8`, and [documents, ceil(dimensions / 8)] uint8
    for `ubinary`, as in sentence-transformers' `quantize_embeddings`.
    """

    texts: tuple[str, ...]
    vectors: np.ndarray
    precision: Precision

    def signs(self, dimensions: int) -> np.ndarray:
        """Return the bits of a `ubinary` index as -1 and 1, [documents, dimensions] float32."""
        bits = np.unpackbits(self.vectors, axis=1, count=dimensions)
        return np.where(bits > 0, np.float32(1), np.float32(-1))

    def fits(self, dimensions: int) -> bool:
        """Return whether a vector of the index can belong to an embedding of so many dimensions."""
        width = int(self.vectors.shape[1])
        return width == (-(-dimensions // 8) if self.precision == "ubinary" else dimensions)


def is_index_file(reference: str | None) -> TypeGuard[str]:
    """Return whether `evaluation.index` names a file."""
    return reference not in (None, BASELINE_INDEX)


def find_index(reference: str, folder: Path) -> VectorIndex:
    """Return the index in a file below ``folder`` or the current directory. Raises `DataError`."""
    return read_index(find_file(reference, folder, "evaluation.index", f"`{BASELINE_INDEX}`, or a file"))


def read_index(path: Path) -> VectorIndex:
    """Read rows with `text` and `embedding`, a list of numbers. Raises `DataError` with the position of the row.

    Integers from -128 to 127 are `int8`, integers from 0 to 255 are `ubinary`, all other numbers are `float`.
    """
    rows = read_columns(path, _COLUMNS, "; embedding is a list of numbers, so JSONL, JSON or Parquet")
    texts, embeddings = (rows.columns[name] for name in _COLUMNS)
    vectors: list[np.ndarray] = []
    for index, (text, values) in enumerate(zip(texts, embeddings, strict=True)):
        if not isinstance(text, str) or not text.strip():
            raise DataError("The text is empty.", where=rows.place(index), expected="the text of the document")
        vectors.append(_vector(rows, index, values))
        if len(vectors[-1]) != len(vectors[0]):
            raise DataError(
                f"The embedding has {len(vectors[-1])} numbers, and that of the first row {len(vectors[0])}.",
                where=rows.place(index),
                expected="embeddings of one width",
            )
    if len(vectors) < _ROWS:
        raise DataError(f"{rows.name} has {len(vectors)} rows.", where=str(path), expected=f"at least {_ROWS}")
    integers = all(vector.dtype.kind in "iu" for vector in vectors)
    numbers = np.stack(vectors)
    if not integers:
        return VectorIndex(tuple(texts), numbers.astype(np.float32), "float")
    lowest, highest = int(numbers.min()), int(numbers.max())
    if -128 <= lowest < 0 and highest <= 127:
        return VectorIndex(tuple(texts), numbers.astype(np.float32), "int8")
    if lowest >= 0 and highest <= 255:
        return VectorIndex(tuple(texts), numbers.astype(np.uint8), "ubinary")
    raise DataError(
        f"The embeddings of {rows.name} are integers from {lowest} to {highest}.",
        where=str(path),
        expected="floating-point numbers, integers from -128 to 127 (int8), or bytes from 0 to 255 (ubinary)",
    )


def _vector(rows: Rows, index: int, values: Any) -> np.ndarray:
    """Return an embedding as an array of integers or floats. Raises `DataError`."""
    expected = "a list of finite numbers"
    if not isinstance(values, list) or not values:
        raise DataError(f"The embedding is {values!r:.60}.", where=rows.place(index), expected=expected)
    try:
        vector = np.array(values)
    except (ValueError, OverflowError):
        vector = np.array([], dtype=object)
    if vector.ndim != 1 or vector.dtype.kind not in "iuf" or not np.isfinite(vector).all():
        raise DataError("The embedding has values that are no numbers.", where=rows.place(index), expected=expected)
    return vector
