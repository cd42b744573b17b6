"""Likely causes of a tensor's change: scaling, zeroed rows, pruning, permutation or a merged LoRA."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from compress.numerics.sparsity_pattern import Pattern
from compress.plugins.diff.weight_difference import (
    Chunks,
    DifferenceSums,
    Spectrum,
    reordered,
)
from compress.results.formatting import format_number

_LEFT = 0.05
"""Share of the difference's norm that a cause may leave unexplained."""
_PATTERNS = (Pattern(2, 4), Pattern(1, 4), Pattern(4, 8))
_NAMED = 8
_MOST_ROWS = 200_000
_TELLING = 4
"""Smallest number of values that a common factor must fit to count as a cause."""


def find_causes(read: DifferenceSums, head: Spectrum | None, chunks: Chunks, shape: tuple[int, int]) -> tuple[str, ...]:
    """Return likely causes of a change in words, the most obvious first, or nothing if the numbers show none.

    Args:
        read: Sums of the differences.
        head: Spectrum of the difference, if it was computed.
        chunks: Rows of both tensors.
        shape: Shape of the matrices.
    """
    if read.not_finite[1] > read.not_finite[0]:
        return (f"{read.not_finite[1]} values are not finite",)
    causes = tuple(_causes_in_sums(read, chunks, shape))
    if causes or head is None:
        return causes
    lengths = np.sqrt(read.rows.difference)
    if head.rank == 1 and lengths.std() <= _LEFT * lengths.mean():
        return ("the same vector was added to every row, as when two embedding tables are merged",)
    if head.rank is not None and head.rank < min(shape) // 2:
        return (f"a change of rank {head.rank} was added, as a merged LoRA adds it",)
    return ()


def _causes_in_sums(read: DifferenceSums, chunks: Chunks, shape: tuple[int, int]) -> Iterator[str]:
    """Yield causes that the sums show: a common factor, zeroed rows, pruning, or a new order."""
    if read.size >= _TELLING and read.before and read.difference:
        # The best common factor must leave little of the difference's norm.
        residual = max(read.after - read.product**2 / read.before, 0.0) / read.difference
        if float(np.sqrt(residual)) <= _LEFT:
            yield f"all of it is {format_number(read.product / read.before, 4)} times what it was"
            return
    zeroed = np.flatnonzero((read.rows.before > 0) & (read.rows.after == 0))
    if len(zeroed):
        more = f" and {len(zeroed) - _NAMED} more" if len(zeroed) > _NAMED else ""
        shown = ", ".join(map(str, zeroed[:_NAMED])) + more
        zeros = f"row {shown} is all zeros now" if len(zeroed) == 1 else f"rows {shown} are all zeros now"
        # Structured pruning sets whole rows to zero. They then contain the whole difference.
        if read.difference - float(read.rows.difference[zeroed].sum()) <= (_LEFT**2) * read.difference:
            yield f"{zeros}, the others are unchanged"
            return
        if len(zeroed) < shape[0]:
            yield zeros
    before, after = (count / read.size for count in read.zeros)
    if after - before >= 0.02:
        yield _describe_pruning(read, chunks, shape)
        return
    yield from _permutations(read, chunks, shape)


def _describe_pruning(read: DifferenceSums, chunks: Chunks, shape: tuple[int, int]) -> str:
    """Describe new zeros by their share and N:M pattern, and state whether the other values changed."""
    before, after = (count / read.size for count in read.zeros)
    unchanged = read.kept / max(read.size - read.zeros[1], 1)
    others = "the others are unchanged" if unchanged > 0.99 else "the others changed too"
    # The first pattern that no stretch of inputs exceeds.
    for pattern in _PATTERNS:
        if pattern.fits(shape[1]) and all(
            int(np.count_nonzero(rows.reshape(len(rows), -1, pattern.second), axis=-1).max()) <= pattern.first
            for _, rows in chunks()
        ):
            text = f" by {pattern}" if after > pattern.sparsity - 0.02 else ""
            return f"pruned{text}: {after:.1%} zeros where there were {before:.1%}, {others}"
    return f"pruned: {after:.1%} zeros where there were {before:.1%}, {others}"


def _permutations(read: DifferenceSums, chunks: Chunks, shape: tuple[int, int]) -> Iterator[str]:
    """Yield the description of a permutation of rows or of columns, or of blocks of them."""
    for along_rows, axis, name in ((True, read.rows, "row"), (False, read.columns, "column")):
        old, new = np.sqrt(np.sort(axis.before)), np.sqrt(np.sort(axis.after))
        # A permutation keeps the sorted norms. This is much cheaper than a search for the order.
        if 1 < len(old) <= _MOST_ROWS and np.linalg.norm(old - new) <= 0.05 * np.linalg.norm(old):
            order = reordered(chunks, shape, along_rows)
            if order is not None:
                unit = f"{name}s" if order.block == 1 else f"blocks of {order.block} {name}s"
                if order.swapped is not None:
                    yield f"{unit} {order.swapped[0]} and {order.swapped[1]} are swapped"
                else:
                    count = len(order.order) // order.block
                    yield f"{len(order.displaced):,} of {count:,} {unit} are permuted"
                return
