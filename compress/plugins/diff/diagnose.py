"""What was done to a tensor, where its numbers say so plainly."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from compress.numerics.sparse_pattern import Pattern
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
"""Share of the difference's size that a cause may leave unexplained."""
_PATTERNS = (Pattern(2, 4, False), Pattern(1, 4, False), Pattern(4, 8, False))
_NAMED = 8
_MOST_ROWS = 200_000
_SAMPLED = 16
_TELLING = 4
"""Numbers that one factor has to fit."""


def causes_of(read: DifferenceSums, head: Spectrum | None, chunks: Chunks, shape: tuple[int, int]) -> tuple[str, ...]:
    """Return likely causes of a change in words, the most obvious first, or nothing if the numbers show none.

    Args:
        read: Sums of the differences.
        head: Spectrum of the difference, if it was computed.
        chunks: Rows of both tensors.
        shape: Shape of the matrices.
    """
    if read.not_finite[1] > read.not_finite[0]:
        return (f"{read.not_finite[1]} values are no finite numbers",)
    found = list(_plain(read, chunks, shape))
    if found or head is None:
        return tuple(found)
    if head.rank is not None and head.rank < min(shape) // 2:
        return (f"a change of rank {head.rank} was added, as a merged LoRA adds it",)
    bits = _lowered(chunks)
    return (f"its rows lie on a grid of {bits} bits now",) if bits is not None else ()


def _plain(read: DifferenceSums, chunks: Chunks, shape: tuple[int, int]) -> Iterator[str]:
    """Factors, zeros and another order."""
    factor = read.product / read.before if read.before else 0.0
    if read.size >= _TELLING and _left(read.before, read.after, read.product, read.difference) <= _LEFT:
        yield f"all of it is {format_number(factor, 4)} times what it was"
        return
    zeroed = np.flatnonzero((read.rows.before > 0) & (read.rows.after == 0))
    if len(zeroed) and _explains(read, zeroed):
        yield f"{_rows(zeroed)} {'is' if len(zeroed) == 1 else 'are'} all zeros now, the others are as they were"
        return
    if len(zeroed) and len(zeroed) < shape[0]:
        yield f"{_rows(zeroed)} {'is' if len(zeroed) == 1 else 'are'} all zeros now"
    if (pruned := _pruned(read, chunks, shape)) is not None:
        yield pruned
        return
    for axis, name, along in ((read.rows, "row", shape[1]), (read.columns, "column", shape[0])):
        if along >= _TELLING and len(axis.before) > 1 and (by_axis := _scaled(axis, name)) is not None:
            yield by_axis
            return
    yield from _orders(read, chunks, shape)


def _left(before: float, after: float, product: float, difference: float) -> float:
    """What the best factor leaves of the difference, as a share of its size."""
    if not before or not difference:
        return 1.0
    return float(np.sqrt(max(after - product**2 / before, 0.0) / difference))


def _explains(read: DifferenceSums, zeroed: np.ndarray) -> bool:
    """Whether rows alone are the whole difference."""
    others = read.difference - float(read.rows.difference[zeroed].sum())
    return bool(others <= (_LEFT**2) * read.difference)


def _rows(places: np.ndarray) -> str:
    shown = ", ".join(map(str, places[:_NAMED]))
    more = f" and {len(places) - _NAMED} more" if len(places) > _NAMED else ""
    return f"row{'s' if len(places) > 1 else ''} {shown}{more}"


def _pruned(read: DifferenceSums, chunks: Chunks, shape: tuple[int, int]) -> str | None:
    """Zeros where none were; by which pattern, and whether what is left is as it was."""
    before, after = (count / read.size for count in read.zeros)
    if after - before < 0.02:
        return None
    kept = read.kept / max(read.size - read.zeros[1], 1)
    rest = "the others are as they were" if kept > 0.99 else "the others were changed too"
    pattern = next((one for one in _PATTERNS if one.fits(*shape) and _keeps_to(chunks, one)), None)
    by = (
        f" by {pattern}"
        if pattern is not None and pattern.sparsity is not None and after > pattern.sparsity - 0.02
        else ""
    )
    return f"pruned{by}: {after:.1%} zeros where there were {before:.1%}, {rest}"


def _keeps_to(chunks: Chunks, pattern: Pattern) -> bool:
    """Whether no stretch of inputs keeps more than the pattern lets it."""
    return all(
        int(np.count_nonzero(after.reshape(len(after), -1, pattern.second), axis=-1).max()) <= pattern.first
        for _, after in chunks()
    )


def _scaled(axis: AxisSums, name: str) -> str | None:
    """A factor of each row, or of each column."""
    factors = np.divide(axis.product, axis.before, out=np.ones_like(axis.product), where=axis.before > 0)
    left = float((axis.after - factors * axis.product).clip(min=0).sum())
    if left > _LEFT**2 * float(axis.difference.sum()):
        return None
    moved = np.flatnonzero(np.abs(factors - 1) > 1e-3)
    low, high = format_number(float(factors[moved].min()), 4), format_number(float(factors[moved].max()), 4)
    by = f"{low} times" if low == high else f"{low} to {high} times"
    if len(moved) == len(factors):
        return f"every {name} is {by} what it was"
    return f"{len(moved):,} of {len(factors):,} {name}s are {by} what they were"


def _orders(read: DifferenceSums, chunks: Chunks, shape: tuple[int, int]) -> Iterator[str]:
    for along_rows, axis, name in ((True, read.rows, "row"), (False, read.columns, "column")):
        if 1 < len(axis.before) <= _MOST_ROWS and _same_norms(axis):
            found = reordered(chunks, shape, along_rows)
            if found is not None:
                yield _order_words(found, name)
                return


def _same_norms(axis: AxisSums) -> bool:
    old, new = np.sqrt(np.sort(axis.before)), np.sqrt(np.sort(axis.after))
    return bool(np.linalg.norm(old - new) <= 0.05 * np.linalg.norm(old))


def _order_words(found: Reordered, name: str) -> str:
    unit = f"{name}s" if found.block == 1 else f"blocks of {found.block} {name}s"
    if found.swapped is not None:
        one, other = found.swapped
        return f"{unit} {one} and {other} have changed places"
    return f"{len(found.displaced):,} of {len(found.order) // found.block:,} {unit} stand in another order"


def _lowered(chunks: Chunks) -> int | None:
    """The bits of a coarser grid that the second's rows lie on and the first's don't."""
    before, after = next(iter(chunks()))
    places = np.linspace(0, len(before) - 1, min(_SAMPLED, len(before))).astype(int)
    bits = grid_bits(after[places])
    own = grid_bits(before[places])
    return bits if bits is not None and (own is None or own > bits) else None
