"""Likely causes of a tensor's change: scaling, zeroed rows, pruning, permutation, a merged LoRA or fewer bits."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from compress.numerics.sparse_solver import Pattern
from compress.numerics.weight_difference import (
    AxisSums,
    Chunks,
    DifferenceSums,
    Reordered,
    Spectrum,
    grid_bits,
    reordered,
)
from compress.results.formatting import format_number

_LEFT = 0.05
"""Share of the difference's norm that a cause may leave unexplained."""
_PATTERNS = (Pattern(2, 4, False), Pattern(1, 4, False), Pattern(4, 8, False))
_NAMED = 8
_MOST_ROWS = 200_000
_SAMPLED = 16
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
        return (f"{read.not_finite[1]} values are no finite numbers",)
    causes = list(_causes_in_sums(read, chunks, shape))
    if causes or head is None:
        return tuple(causes)
    if head.rank is not None and head.rank < min(shape) // 2:
        return (f"a change of rank {head.rank} was added, as a merged LoRA adds it",)
    bits = _coarser_grid_bits(chunks)
    return (f"its rows lie on a grid of {bits} bits now",) if bits is not None else ()


def _causes_in_sums(read: DifferenceSums, chunks: Chunks, shape: tuple[int, int]) -> Iterator[str]:
    """Yield causes that the sums show: a common factor, zeroed rows, pruning, a factor for each row, or a new order."""
    factor = read.product / read.before if read.before else 0.0
    if read.size >= _TELLING and _residual_share(read.before, read.after, read.product, read.difference) <= _LEFT:
        yield f"all of it is {format_number(factor, 4)} times what it was"
        return
    zeroed = np.flatnonzero((read.rows.before > 0) & (read.rows.after == 0))
    # Structured pruning sets whole rows to zero and leaves the others.
    if len(zeroed) and _zeroed_rows_explain(read, zeroed):
        yield f"{_rows(zeroed)} {'is' if len(zeroed) == 1 else 'are'} all zeros now, the others are as they were"
        return
    if len(zeroed) and len(zeroed) < shape[0]:
        yield f"{_rows(zeroed)} {'is' if len(zeroed) == 1 else 'are'} all zeros now"
    if (pruned := _describe_pruning(read, chunks, shape)) is not None:
        yield pruned
        return
    for axis, name, length in ((read.rows, "row", shape[1]), (read.columns, "column", shape[0])):
        if length >= _TELLING and len(axis.before) > 1 and (scaling := _axis_scaling(axis, name)) is not None:
            yield scaling
            return
    yield from _permutations(read, chunks, shape)


def _residual_share(before: float, after: float, product: float, difference: float) -> float:
    """Return the share of the difference's norm that the best common factor does not explain."""
    if not before or not difference:
        return 1.0
    return float(np.sqrt(max(after - product**2 / before, 0.0) / difference))


def _zeroed_rows_explain(read: DifferenceSums, zeroed: np.ndarray) -> bool:
    """Return True if the zeroed rows contain the whole difference."""
    # Rows that are not zeroed must not differ.
    others = read.difference - float(read.rows.difference[zeroed].sum())
    return bool(others <= (_LEFT**2) * read.difference)


def _rows(places: np.ndarray) -> str:
    shown = ", ".join(map(str, places[:_NAMED]))
    more = f" and {len(places) - _NAMED} more" if len(places) > _NAMED else ""
    return f"row{'s' if len(places) > 1 else ''} {shown}{more}"


def _describe_pruning(read: DifferenceSums, chunks: Chunks, shape: tuple[int, int]) -> str | None:
    """Describe new zeros by their share and N:M pattern, and state whether the other values changed."""
    before, after = (count / read.size for count in read.zeros)
    if after - before < 0.02:
        return None
    unchanged = read.kept / max(read.size - read.zeros[1], 1)
    others = "the others are as they were" if unchanged > 0.99 else "the others were changed too"
    # Whether no stretch of inputs keeps more than the pattern lets it.
    pattern = next(
        (
            candidate
            for candidate in _PATTERNS
            if candidate.fits(*shape)
            and all(
                int(np.count_nonzero(after.reshape(len(after), -1, candidate.second), axis=-1).max()) <= candidate.first
                for _, after in chunks()
            )
        ),
        None,
    )
    pattern_text = (
        f" by {pattern}"
        if pattern is not None and pattern.sparsity is not None and after > pattern.sparsity - 0.02
        else ""
    )
    return f"pruned{pattern_text}: {after:.1%} zeros where there were {before:.1%}, {others}"


def _axis_scaling(axis: AxisSums, name: str) -> str | None:
    """Describe a factor for each row or each column, or return None if factors do not explain the difference."""
    # Least squares: the factor of a row is its inner product with the old row over the old row's square.
    factors = np.divide(axis.product, axis.before, out=np.ones_like(axis.product), where=axis.before > 0)
    residual = float((axis.after - factors * axis.product).clip(min=0).sum())
    if residual > _LEFT**2 * float(axis.difference.sum()):
        return None
    moved = np.flatnonzero(np.abs(factors - 1) > 1e-3)
    low, high = format_number(float(factors[moved].min()), 4), format_number(float(factors[moved].max()), 4)
    range_text = f"{low} times" if low == high else f"{low} to {high} times"
    if len(moved) == len(factors):
        return f"every {name} is {range_text} what it was"
    return f"{len(moved):,} of {len(factors):,} {name}s are {range_text} what they were"


def _permutations(read: DifferenceSums, chunks: Chunks, shape: tuple[int, int]) -> Iterator[str]:
    """Yield the description of a permutation of rows or of columns."""
    for along_rows, axis, name in ((True, read.rows, "row"), (False, read.columns, "column")):
        old, new = np.sqrt(np.sort(axis.before)), np.sqrt(np.sort(axis.after))
        # A permutation keeps the sorted norms. This is much cheaper than a search for the order.
        if 1 < len(old) <= _MOST_ROWS and np.linalg.norm(old - new) <= 0.05 * np.linalg.norm(old):
            order = reordered(chunks, shape, along_rows)
            if order is not None:
                yield _describe_order(order, name)
                return


def _describe_order(order: Reordered, name: str) -> str:
    """Describe a permutation of rows or columns, or of blocks of them."""
    unit = f"{name}s" if order.block == 1 else f"blocks of {order.block} {name}s"
    if order.swapped is not None:
        first, second = order.swapped
        return f"{unit} {first} and {second} have changed places"
    return f"{len(order.displaced):,} of {len(order.order) // order.block:,} {unit} stand in another order"


def _coarser_grid_bits(chunks: Chunks) -> int | None:
    """Return the bits of a coarser integer grid that only the new rows lie on, or None."""
    before, after = next(iter(chunks()))
    row_indices = np.linspace(0, len(before) - 1, min(_SAMPLED, len(before))).astype(int)
    bits = grid_bits(after[row_indices])
    previous_bits = grid_bits(before[row_indices])
    return bits if bits is not None and (previous_bits is None or previous_bits > bits) else None
