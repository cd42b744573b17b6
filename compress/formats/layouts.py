"""The same numbers in another order of axes and another shape: which array holds those of which."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import permutations

import numpy as np

_MOST_AXES = 4
"""Axes longer than 1 up to which every order of them is looked at."""
_SAMPLE = 4096
"""Numbers of a large value that are looked at; they are drawn once for all, the same for every value of a size."""
_TINY = 1e-30


@dataclass(frozen=True)
class Layout:
    """The axes of ``shape`` that are longer than 1 in another ``order``, and all of it as ``other``."""

    shape: tuple[int, ...]
    order: tuple[int, ...]
    other: tuple[int, ...]

    def there(self, array: np.ndarray) -> np.ndarray:
        """An array of ``shape``, laid out as ``other``."""
        return array.reshape(self._long()).transpose(self.order).reshape(self.other)

    def back(self, array: np.ndarray) -> np.ndarray:
        """An array of ``other``, laid out as ``shape``."""
        long = self._long()
        moved = array.reshape([long[axis] for axis in self.order])
        return moved.transpose(np.argsort(self.order)).reshape(self.shape)

    def _long(self) -> list[int]:
        return [size for size in self.shape if size > 1]


def orders_of(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Every order of the axes longer than 1, the plainest first."""
    long = range(len([size for size in shape if size > 1]))
    return list(permutations(long)) if len(long) <= _MOST_AXES else [tuple(long)]


@dataclass(frozen=True)
class Likeness:
    """``other`` holds the numbers of ``value`` in ``layout``, but for ``error``, a share of the value's spread.

    ``correlation`` is what remains of likeness if they may have another scale and mean.
    """

    value: str
    other: str
    layout: Layout
    error: float
    correlation: float


def alike(values: Mapping[str, np.ndarray], others: Mapping[str, np.ndarray]) -> list[Likeness]:
    """For each value and other of one size, that layout in which they differ least."""
    by_size: dict[int, list[str]] = defaultdict(list)
    for name, array in others.items():
        by_size[array.size].append(name)
    found: list[Likeness] = []
    for name, array in values.items():
        names = by_size[array.size]
        if names:
            found += _alike(name, array, {one: others[one] for one in names})
    return found


def _alike(name: str, array: np.ndarray, others: Mapping[str, np.ndarray]) -> Iterator[Likeness]:
    orders, places = orders_of(array.shape), _places(array.size)
    flat = [Layout(array.shape, order, (array.size,)) for order in orders]
    ours = np.stack([one.there(array)[places] for one in flat]).astype(np.float64)
    theirs = np.stack([other.ravel()[places] for other in others.values()]).astype(np.float64)
    count, spread = len(places), max(float(array.std()), _TINY)
    squares = (theirs**2).sum(axis=1) - 2 * ours @ theirs.T + (ours**2).sum(axis=1, keepdims=True)
    errors = np.sqrt(np.maximum(squares, 0) / count) / spread
    same = _unit(ours) @ _unit(theirs).T
    # What is left between equal numbers is the rounding of the sums, so that the first of equal layouts is taken.
    best = errors.round(6).argmin(axis=0)
    for place, (other, held) in enumerate(others.items()):
        way = int(best[place])
        layout = Layout(array.shape, orders[way], held.shape)
        yield Likeness(name, other, layout, round(float(errors[way, place]), 6), float(same[way, place]))


def _places(size: int) -> np.ndarray:
    """Which numbers are looked at."""
    if size <= _SAMPLE:
        return np.arange(size)
    return np.random.default_rng(0).integers(0, size, _SAMPLE)


def _unit(rows: np.ndarray) -> np.ndarray:
    """Each row less its mean, of length 1."""
    centred = rows - rows.mean(axis=1, keepdims=True)
    unit: np.ndarray = centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), _TINY)
    return unit
