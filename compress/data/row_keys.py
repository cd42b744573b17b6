"""Identities of rows by the content of their inputs, and groups of equal rows, in arrays of 16 bytes per row."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from compress.data.columns import normalised
from compress.data.media import identities

if TYPE_CHECKING:
    import pyarrow as pa

_PART_ROWS = 1 << 20
_KEY_BYTES = 16
_KEY_TYPE = np.dtype(f"S{_KEY_BYTES}")


def keys(table: pa.Table, columns: Sequence[str]) -> np.ndarray:
    """Return the identity of each row, [n] S16: a digest of normalized texts and content digests of files.

    Labels do not count.
    """
    result = bytearray()
    for row in zip(*(identities(table[name]) for name in columns), strict=True):
        # Lengths separate the values, so that no two rows are written alike.
        texts = (f"{len(text)} {text}" for text in map(normalised, row))
        result += hashlib.blake2b("".join(texts).encode(), digest_size=_KEY_BYTES).digest()
    return np.frombuffer(result, _KEY_TYPE) if result else np.empty(0, _KEY_TYPE)


def members(row_keys: np.ndarray, among: Iterable[np.ndarray]) -> np.ndarray:
    """Return the indices of the keys, [n] S16, that occur ``among`` other keys."""
    other = [np.unique(keys) for keys in among if len(keys)]
    if not other:
        return np.empty(0, np.int64)
    ordered = np.unique(np.concatenate(other))
    indices = []
    for start in range(0, len(row_keys), _PART_ROWS):
        part = row_keys[start : start + _PART_ROWS]
        positions = np.minimum(np.searchsorted(ordered, part), len(ordered) - 1)
        indices.append(start + np.flatnonzero(ordered[positions] == part))
    return np.concatenate(indices) if indices else np.empty(0, np.int64)


@dataclass(frozen=True, eq=False)
class RowGroups:
    """Groups of equal rows in the order of their first rows.

    ``rows`` holds the rows of each group together and rising, [n_rows]. A group begins there at its entry of
    ``starts`` and has a number of rows, ``sizes``, [n_groups].
    """

    rows: np.ndarray
    starts: np.ndarray
    sizes: np.ndarray

    def rows_of(self, group: int) -> np.ndarray:
        """Return the rows of a group."""
        return self.rows[self.starts[group] : self.starts[group] + self.sizes[group]]

    def of_rows(self, values: np.ndarray) -> np.ndarray:
        """Return for each row the value of its group, given the values of the groups, [n_groups]."""
        stored = np.argsort(self.starts)
        result = np.empty(len(self.rows), values.dtype)
        result[self.rows] = np.repeat(values[stored], self.sizes[stored])
        return result


def group_rows(row_keys: np.ndarray) -> RowGroups:
    """Return the groups of rows with equal keys, [n_rows]."""
    # Half the memory of 64 bits, for files of many rows.
    index_type = np.int32 if len(row_keys) < 1 << 31 else np.int64
    # The sort is stable, so that rows of one group rise.
    order = np.argsort(row_keys, kind="stable").astype(index_type)
    is_first = np.ones(len(order), bool)
    for start in range(1, len(order), _PART_ROWS):
        end = min(start + _PART_ROWS, len(order))
        is_first[start:end] = row_keys[order[start:end]] != row_keys[order[start - 1 : end - 1]]
    starts = np.flatnonzero(is_first).astype(index_type)
    sizes = np.diff(starts, append=index_type(len(order)))
    by_appearance = np.argsort(order[starts])
    return RowGroups(order, starts[by_appearance], sizes[by_appearance])
