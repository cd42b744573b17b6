"""Differences of two weight matrices, read in chunks of rows: sums, row orders, leading singular values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.spatial import cKDTree

Chunk = tuple[np.ndarray, np.ndarray]
"""The same rows of both matrices, float32 [rows, columns]; one array twice if they are equal."""
Chunks = Callable[[], Iterator[Chunk]]
"""Function that iterates over both matrices from the start, each time it is called."""

_DIRECTIONS, _PASSES = 16, 2
_PROJECTIONS = 16


class AxisSums(NamedTuple):
    """Sums per row or column: squares of both matrices, their products, and squares of the difference."""

    before: np.ndarray
    after: np.ndarray
    product: np.ndarray
    difference: np.ndarray


@dataclass
class DifferenceSums:
    """Summary of two matrices and their difference: squares by row and column, ranges, zeros."""

    rows: AxisSums
    columns: AxisSums
    low: tuple[float, float]
    high: tuple[float, float]
    zeros: tuple[int, int]
    kept: int
    """Number of entries that are equal in both matrices and not 0."""
    not_finite: tuple[int, int]
    size: int

    @property
    def before(self) -> float:
        """Return the sum of squares of the first matrix."""
        return float(self.rows.before.sum())

    @property
    def after(self) -> float:
        """Return the sum of squares of the second matrix."""
        return float(self.rows.after.sum())

    @property
    def product(self) -> float:
        """Return the sum of the products."""
        return float(self.rows.product.sum())

    @property
    def difference(self) -> float:
        """Return the sum of squares of the difference."""
        return float(self.rows.difference.sum())

    @property
    def relative(self) -> float:
        """Return the norm of the difference over that of the first matrix; infinite if the first is all zeros."""
        return ratio(self.difference, self.before)

    @property
    def cosine(self) -> float:
        """Return the cosine of the angle between both matrices; 1 if both are all zeros."""
        norms = np.sqrt(self.before) * np.sqrt(self.after)
        return float(np.clip(self.product / norms, -1, 1)) if norms else float(self.before == self.after)


def ratio(part: float, whole: float) -> float:
    """Return the square root of ``part`` over ``whole``: 0 for 0 over 0, infinite for a positive part over 0."""
    return float(np.sqrt(part / whole)) if whole else float("inf") if part else 0.0


def sums(chunks: Chunks) -> DifferenceSums:
    """Read both matrices once and return their sums. Entries that are not finite count as 0 and are counted."""
    by_row: list[list[np.ndarray]] = []
    by_column: list[np.ndarray] | None = None
    low, high = [np.inf, np.inf], [-np.inf, -np.inf]
    zeros, bad, unchanged, size = [0, 0], [0, 0], 0, 0
    for pair in chunks():
        first = _finite(pair[0], bad, 0)
        # Equal chunks need half of the work.
        same = pair[1] is pair[0]
        second = first if same else _finite(pair[1], bad, 1)
        bad[1] += int((~np.isfinite(pair[0])).sum()) if same and first is not pair[0] else 0
        by_row.append(_products(first, second, "ij,ij->i"))
        columns = _products(first, second, "ij,ij->j")
        by_column = columns if by_column is None else [old + new for old, new in zip(by_column, columns, strict=True)]
        for index, side in enumerate((first,) if same else (first, second)):
            low[index], high[index] = min(low[index], float(side.min())), max(high[index], float(side.max()))
            zeros[index] += (empty := side.size - int(np.count_nonzero(side)))
        # For equal chunks the second matrix's statistics are copied from the first's.
        if same:
            low[1], high[1], zeros[1] = min(low[1], low[0]), max(high[1], high[0]), zeros[1] + empty
        unchanged += first.size - empty if same else int(np.count_nonzero((second == first) & (second != 0)))
        size += first.size
    if by_column is None:
        raise ValueError("expected at least one row")
    rows = AxisSums(*(np.concatenate(parts) for parts in zip(*by_row, strict=True)))
    both_low, both_high = (low[0], low[1]), (high[0], high[1])
    return DifferenceSums(
        rows, AxisSums(*by_column), both_low, both_high, (zeros[0], zeros[1]), unchanged, (bad[0], bad[1]), size
    )


def _products(before: np.ndarray, after: np.ndarray, axes: str) -> list[np.ndarray]:
    """Return summed squares of both, products, and squares of the difference, by einsum ``axes``."""
    first_squares: np.ndarray = np.einsum(axes, before, before).astype(np.float64)
    if after is before:
        return [first_squares, first_squares, first_squares, np.zeros_like(first_squares)]
    difference = after - before
    pairs = ((after, after), (before, after), (difference, difference))
    return [first_squares, *(np.einsum(axes, *pair).astype(np.float64) for pair in pairs)]


def _finite(array: np.ndarray, bad: list[int], index: int) -> np.ndarray:
    if np.isfinite(array.sum(dtype=np.float64)):
        return array
    wrong = ~np.isfinite(array)
    bad[index] += int(wrong.sum())
    return np.where(wrong, np.float32(0), array)


class Spectrum(NamedTuple):
    """Largest singular values of both matrices and of their difference, descending, and the difference's rank.

    ``rank`` is the number of directions that hold 99.9% of the difference's squares, or None if more are needed.
    """

    before: tuple[float, ...]
    after: tuple[float, ...]
    difference: tuple[float, ...]
    rank: int | None


def spectrum(chunks: Chunks, columns: int, size_of_difference: float) -> Spectrum:
    """Return leading singular values by subspace iteration from random directions.

    Halko, Martinsson and Tropp 2011, algorithm 4.4. Both matrices are read three times. ``size_of_difference`` is the
    sum of squares of the difference.
    """
    count = min(_DIRECTIONS, columns)
    start = np.linalg.qr(np.random.default_rng(0).standard_normal((columns, count)))[0].astype(np.float32)
    # Iterate for both matrices and their difference with the same start.
    bases = [start, start, start]
    for _ in range(_PASSES):
        turned = [np.zeros((columns, count)) for _ in bases]
        for matrices in _with_difference(chunks):
            for whole, matrix, basis in zip(turned, matrices, bases, strict=True):
                whole += matrix.T @ (matrix @ basis)
        # Orthonormalisation keeps the directions apart.
        bases = [np.linalg.qr(whole)[0].astype(np.float32) for whole in turned]
    grams = [np.zeros((count, count)) for _ in bases]
    for matrices in _with_difference(chunks):
        for gram, matrix, basis in zip(grams, matrices, bases, strict=True):
            image = (matrix @ basis).astype(np.float64)
            gram += image.T @ image
    # Eigenvalues of the projected Gram matrix are squared singular values.
    squares = [np.sort(np.clip(np.linalg.eigvalsh(gram), 0, None))[::-1] for gram in grams]
    enough = np.flatnonzero(np.cumsum(squares[2]) >= 0.999 * size_of_difference)
    rank = int(enough[0]) + 1 if size_of_difference and len(enough) and enough[0] + 1 < columns else None
    first, second, difference = (tuple(np.sqrt(values).tolist()) for values in squares)
    return Spectrum(first, second, difference, rank)


def _with_difference(chunks: Chunks) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    for first, second in chunks():
        yield first, second, second - first


@dataclass(frozen=True)
class Reordered:
    """Order of rows or columns: index i of the second matrix is the first's ``order[i]``.

    ``left`` is the share of the squared difference that remains. ``block`` neighbours move together.
    """

    order: tuple[int, ...]
    left: float
    block: int

    @property
    def displaced(self) -> tuple[int, ...]:
        """Return the indices of blocks at another position."""
        firsts = self.order[:: self.block]
        return tuple(at for at, index in enumerate(firsts) if index != at * self.block)

    @property
    def swapped(self) -> tuple[int, int] | None:
        """Return the two blocks that changed places, if no other block moved."""
        return (self.displaced[0], self.displaced[1]) if len(self.displaced) == 2 else None


def reordered(chunks: Chunks, shape: tuple[int, int], along_rows: bool, share: float = 0.1) -> Reordered | None:
    """Return the order in which rows or columns of the first matrix form the second; None without a good one.

    Rows are compared by random projections, which preserve distances (Johnson and Lindenstrauss 1984).

    Args:
        chunks: Both matrices.
        shape: Their shape.
        along_rows: Compare rows; otherwise columns.
        share: Share of the squared difference that may remain.
    """
    first, second = _projected(chunks, shape, along_rows)
    total = float(np.square(second - first).sum())
    order = cKDTree(first).query(second)[1]
    # Where rows are alike, each stays where it is: an order only counts where it helps.
    is_unmoved = np.square(second - first).sum(axis=1) <= np.square(second - first[order]).sum(axis=1)
    order = np.where(is_unmoved, np.arange(len(order)), order)
    remaining = float(np.square(second - first[order]).sum()) / total if total else 1.0
    # An order must explain most of the difference and be a permutation.
    if remaining > share or len(np.unique(order)) != len(order):
        return None
    return Reordered(tuple(order.tolist()), remaining, _block(order))


def _projected(chunks: Chunks, shape: tuple[int, int], along_rows: bool) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    # Rows are projected directly; columns accumulate products over chunks.
    if along_rows:
        directions = generator.standard_normal((shape[1], _PROJECTIONS)).astype(np.float32)
        projected = [(first @ directions, second @ directions) for first, second in chunks()]
        befores, afters = zip(*projected, strict=True)
        return np.concatenate(befores), np.concatenate(afters)
    whole = [np.zeros((shape[1], _PROJECTIONS)), np.zeros((shape[1], _PROJECTIONS))]
    for pair in chunks():
        directions = generator.standard_normal((len(pair[0]), _PROJECTIONS)).astype(np.float32)
        for total, side in zip(whole, pair, strict=True):
            total += side.T @ directions
    return whole[0], whole[1]


def _block(order: np.ndarray) -> int:
    """Return the largest number of neighbours that stay together, among divisors of the size."""
    count = len(order)
    # Try the largest divisors first.
    for size in range(count // 2, 1, -1):
        if count % size == 0:
            blocks = order.reshape(-1, size)
            if (blocks[:, :1] % size == 0).all() and (blocks == blocks[:, :1] + np.arange(size)).all():
                return size
    return 1


def repeated_within(order: np.ndarray) -> int | None:
    """Return the size of equal blocks in each of which ``order`` is the same; None if there are no such blocks."""
    count = len(order)
    for size in range(2, count // 2 + 1):
        if count % size == 0:
            blocks = order.reshape(-1, size) - np.arange(0, count, size)[:, None]
            if blocks.min() >= 0 and blocks.max() < size and (blocks == blocks[0]).all():
                return size
    return None


def smallest_steps(values: np.ndarray, block: int = 16) -> np.ndarray:
    """Return for each value of [rows, columns] the least distance of two distinct values in its block.

    This is a grid's step or a multiple of it.
    """
    rows, columns = values.shape
    padded = np.pad(values, ((0, 0), (0, -columns % block)), mode="edge").reshape(rows, -1, block)
    gaps = np.diff(np.sort(padded, axis=-1), axis=-1)
    # Smaller gaps are rounding errors of equal values.
    floor = 1e-5 * np.abs(padded).max(axis=-1, keepdims=True)
    least = np.where(gaps > floor, gaps, np.inf).min(axis=-1)
    return np.asarray(np.where(np.isfinite(least), least, 0).astype(np.float32).repeat(block, axis=-1)[:, :columns])
