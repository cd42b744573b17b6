"""How a matrix of weights differs from another, read in stretches of rows: sums, orders, head of the spectrum."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.spatial import cKDTree

Chunk = tuple[np.ndarray, np.ndarray]
"""The same rows of both matrices, float32 [rows, columns]; one array twice where they are equal."""
Chunks = Callable[[], Iterator[Chunk]]
"""Gives both matrices from the start, as often as it is called."""

_DIRECTIONS, _PASSES = 16, 2
_PROJECTIONS = 16


class Axis(NamedTuple):
    """Of each row or column: the squares of both matrices, their products, and the squares of the difference."""

    before: np.ndarray
    after: np.ndarray
    product: np.ndarray
    difference: np.ndarray


@dataclass
class Sums:
    """What is left of both matrices once they were read: squares by row and column, ranges, zeros."""

    rows: Axis
    columns: Axis
    low: tuple[float, float]
    high: tuple[float, float]
    zeros: tuple[int, int]
    kept: int
    """Entries that are not 0 in the second matrix and equal in both."""
    not_finite: tuple[int, int]
    size: int

    @property
    def before(self) -> float:
        """Sum of squares of the first."""
        return float(self.rows.before.sum())

    @property
    def after(self) -> float:
        """Sum of squares of the second."""
        return float(self.rows.after.sum())

    @property
    def product(self) -> float:
        """Sum of the products."""
        return float(self.rows.product.sum())

    @property
    def difference(self) -> float:
        """Sum of squares of the difference."""
        return float(self.rows.difference.sum())

    @property
    def relative(self) -> float:
        """Size of the difference over that of the first matrix; infinite where that is all zeros."""
        return ratio(self.difference, self.before)

    @property
    def cosine(self) -> float:
        """Cosine of the angle between both, 1 where both are all zeros."""
        norms = np.sqrt(self.before) * np.sqrt(self.after)
        return float(np.clip(self.product / norms, -1, 1)) if norms else float(self.before == self.after)


def ratio(part: float, whole: float) -> float:
    """Square root of ``part`` over ``whole``: 0 of nothing, infinite of something over nothing."""
    return float(np.sqrt(part / whole)) if whole else float("inf") if part else 0.0


def sums(chunks: Chunks) -> Sums:
    """Read both matrices once. Entries that are no finite numbers count as 0, and are counted."""
    by_row: list[list[np.ndarray]] = []
    by_column: list[np.ndarray] | None = None
    low, high = [np.inf, np.inf], [-np.inf, -np.inf]
    zeros, bad, kept, size = [0, 0], [0, 0], 0, 0
    for pair in chunks():
        before = _finite(pair[0], bad, 0)
        same = pair[1] is pair[0]
        after = before if same else _finite(pair[1], bad, 1)
        bad[1] += int((~np.isfinite(pair[0])).sum()) if same and before is not pair[0] else 0
        by_row.append(_products(before, after, "ij,ij->i"))
        columns = _products(before, after, "ij,ij->j")
        by_column = columns if by_column is None else [old + new for old, new in zip(by_column, columns, strict=True)]
        for place, side in enumerate((before,) if same else (before, after)):
            low[place], high[place] = min(low[place], float(side.min())), max(high[place], float(side.max()))
            zeros[place] += (empty := side.size - int(np.count_nonzero(side)))
        if same:
            low[1], high[1], zeros[1] = min(low[1], low[0]), max(high[1], high[0]), zeros[1] + empty
        kept += before.size - empty if same else int(np.count_nonzero((after == before) & (after != 0)))
        size += before.size
    if by_column is None:
        raise ValueError("expected at least one row")
    rows = Axis(*(np.concatenate(parts) for parts in zip(*by_row, strict=True)))
    both_low, both_high = (low[0], low[1]), (high[0], high[1])
    return Sums(rows, Axis(*by_column), both_low, both_high, (zeros[0], zeros[1]), kept, (bad[0], bad[1]), size)


def _products(before: np.ndarray, after: np.ndarray, axes: str) -> list[np.ndarray]:
    """Squares of both, their products, and squares of the difference, summed."""
    own: np.ndarray = np.einsum(axes, before, before).astype(np.float64)
    if after is before:
        return [own, own, own, np.zeros_like(own)]
    apart = after - before
    others = [np.einsum(axes, *both).astype(np.float64) for both in ((after, after), (before, after), (apart, apart))]
    return [own, *others]


def _finite(array: np.ndarray, bad: list[int], place: int) -> np.ndarray:
    if np.isfinite(array.sum(dtype=np.float64)):
        return array
    wrong = ~np.isfinite(array)
    bad[place] += int(wrong.sum())
    return np.where(wrong, np.float32(0), array)


class Spectrum(NamedTuple):
    """The largest singular values of both matrices and of their difference, falling, and the difference's rank.

    ``rank`` is how many directions hold 99.9% of the difference's squares, or None where more would be needed.
    """

    before: tuple[float, ...]
    after: tuple[float, ...]
    difference: tuple[float, ...]
    rank: int | None


def spectrum(chunks: Chunks, columns: int, size_of_difference: float) -> Spectrum:
    """By subspace iteration from random directions (Halko, Martinsson and Tropp 2011, algorithm 4.4).

    ``size_of_difference``: the sum of its squares. Both matrices are read three times.
    """
    count = min(_DIRECTIONS, columns)
    start = np.linalg.qr(np.random.default_rng(0).standard_normal((columns, count)))[0].astype(np.float32)
    bases = [start, start, start]
    for _ in range(_PASSES):
        turned = [np.zeros((columns, count)) for _ in bases]
        for matrices in _with_difference(chunks):
            for whole, matrix, basis in zip(turned, matrices, bases, strict=True):
                whole += matrix.T @ (matrix @ basis)
        bases = [np.linalg.qr(whole)[0].astype(np.float32) for whole in turned]
    grams = [np.zeros((count, count)) for _ in bases]
    for matrices in _with_difference(chunks):
        for gram, matrix, basis in zip(grams, matrices, bases, strict=True):
            image = (matrix @ basis).astype(np.float64)
            gram += image.T @ image
    squares = [np.sort(np.clip(np.linalg.eigvalsh(gram), 0, None))[::-1] for gram in grams]
    enough = np.flatnonzero(np.cumsum(squares[2]) >= 0.999 * size_of_difference)
    rank = int(enough[0]) + 1 if size_of_difference and len(enough) and enough[0] + 1 < columns else None
    before, after, difference = (tuple(np.sqrt(one).tolist()) for one in squares)
    return Spectrum(before, after, difference, rank)


def _with_difference(chunks: Chunks) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    for before, after in chunks():
        yield before, after, after - before


@dataclass(frozen=True)
class Reordered:
    """The second matrix's row (or column) i is the first's ``order[i]``; ``left`` of the squares stays different.

    ``block``: how many neighbours move together.
    """

    order: tuple[int, ...]
    left: float
    block: int

    @property
    def moved(self) -> tuple[int, ...]:
        """Numbers of the blocks that are in another's place."""
        return tuple(
            at for at in range(len(self.order) // self.block) if self.order[at * self.block] != at * self.block
        )

    @property
    def swapped(self) -> tuple[int, int] | None:
        """The two blocks that have changed places, where no other has."""
        return (self.moved[0], self.moved[1]) if len(self.moved) == 2 else None


def reordered(chunks: Chunks, shape: tuple[int, int], along_rows: bool, share: float = 0.1) -> Reordered | None:
    """The order in which the first matrix's rows, or columns, are the second's; None where no order explains enough.

    Rows are known by random projections, which keep their distances (Johnson and Lindenstrauss 1984). ``share`` of
    the difference may stay.
    """
    before, after = _projected(chunks, shape, along_rows)
    apart = float(np.square(after - before).sum())
    order = cKDTree(before).query(after)[1]
    # Where rows are alike, each stays where it is: an order only counts where it helps.
    stays = np.square(after - before).sum(axis=1) <= np.square(after - before[order]).sum(axis=1)
    order = np.where(stays, np.arange(len(order)), order)
    left = float(np.square(after - before[order]).sum()) / apart if apart else 1.0
    if left > share or len(np.unique(order)) != len(order):
        return None
    return Reordered(tuple(order.tolist()), left, _block(order))


def _projected(chunks: Chunks, shape: tuple[int, int], along_rows: bool) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    if along_rows:
        directions = generator.standard_normal((shape[1], _PROJECTIONS)).astype(np.float32)
        found = [[side @ directions for side in pair] for pair in chunks()]
        return np.concatenate([one[0] for one in found]), np.concatenate([one[1] for one in found])
    whole = [np.zeros((shape[1], _PROJECTIONS)), np.zeros((shape[1], _PROJECTIONS))]
    for pair in chunks():
        directions = generator.standard_normal((len(pair[0]), _PROJECTIONS)).astype(np.float32)
        for total, side in zip(whole, pair, strict=True):
            total += side.T @ directions
    return whole[0], whole[1]


def _block(order: np.ndarray) -> int:
    """The most neighbours, of a number that divides all, that stay neighbours wherever they go."""
    count = len(order)
    for size in range(count // 2, 1, -1):
        if count % size == 0:
            blocks = order.reshape(-1, size)
            if (blocks[:, :1] % size == 0).all() and (blocks == blocks[:, :1] + np.arange(size)).all():
                return size
    return 1


def repeated_within(order: np.ndarray) -> int | None:
    """The size of equal blocks within each of which ``order`` is the same; None where there are no such, or one."""
    count = len(order)
    for size in range(2, count // 2 + 1):
        if count % size == 0:
            blocks = order.reshape(-1, size) - np.arange(0, count, size)[:, None]
            if blocks.min() >= 0 and blocks.max() < size and (blocks == blocks[0]).all():
                return size
    return None


def grid_bits(rows: np.ndarray, most: int = 8) -> int | None:
    """The fewest bits whose values every row of [n, m] fits; None for ``most`` bits or more, or rows too short."""
    if rows.shape[1] < 4 << most:
        most = max(1, int(np.log2(max(2, rows.shape[1] // 4))))
    distinct = max(len(np.unique(row)) for row in rows)
    bits = int(np.ceil(np.log2(max(distinct, 2))))
    return bits if bits < most else None


def smallest_steps(values: np.ndarray, block: int = 16) -> np.ndarray:
    """Of each value of [rows, columns] the least distance of two unlike values in its block: a grid's step or more."""
    rows, columns = values.shape
    padded = np.pad(values, ((0, 0), (0, -columns % block)), mode="edge").reshape(rows, -1, block)
    gaps = np.diff(np.sort(padded, axis=-1), axis=-1)
    floor = 1e-5 * np.abs(padded).max(axis=-1, keepdims=True)
    least = np.where(gaps > floor, gaps, np.inf).min(axis=-1)
    steps: np.ndarray = np.where(np.isfinite(least), least, 0).astype(np.float32).repeat(block, axis=-1)[:, :columns]
    return steps
