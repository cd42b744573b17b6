"""A tensor of one model and what it is in another, laid out alike."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from compress.plugins.diff.dequantize import Weight, flat_shape


@dataclass(frozen=True)
class Pair:
    """``before`` and what it is in the other model: all of ``after``, or ``count`` of its rows from ``start``.

    ``turned``: those rows are columns of ``after``; ``by``: how it was found; ``plus``: a row that is added to each.
    """

    before: Weight
    after: Weight
    by: str
    turned: bool = False
    start: int = 0
    count: int | None = None
    plus: np.ndarray | None = None

    @property
    def whole(self) -> bool:
        """Return True if both have the same layout, so that they are read in parallel."""
        alike = self.before.shape == self.after.shape
        return alike and not self.turned and self.count is None and self.plus is None


def aligned(pair: Pair) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Both tensors of a pair whole, as matrices of one layout, and the step of the second's grid at each entry."""
    before = np.concatenate(list(pair.before.chunks()))
    before = before if pair.plus is None else before + pair.plus
    values, steps = pair.after.read()
    return before, _as_before(pair, values), None if steps is None else _as_before(pair, steps)


def _as_before(pair: Pair, array: np.ndarray) -> np.ndarray:
    shape = pair.before.shape
    if pair.turned:
        array = array.reshape(-1, array.shape[-1]).T if array.ndim != len(shape) or array.ndim == 2 else _moved(array)
    if pair.count is not None:
        array = array.reshape(-1)[pair.start :][: pair.count] if len(shape) < 2 else array[pair.start :][: pair.count]
    elif array.ndim > 2 and array.shape != shape:
        array = _moved(array) if array.shape[0] != shape[0] or array.shape[-1] == shape[1] else array
    rows, columns = flat_shape(shape)
    return np.asarray(array, np.float32).reshape(-1, columns)[:rows]


def _moved(array: np.ndarray) -> np.ndarray:
    """Channels before places: [out, height, width, in] becomes [out, in, height, width]."""
    return np.moveaxis(array, -1, 1)


def rows_of(pair: Pair) -> Weight:
    """The rows of ``pair.after`` that are ``pair.before``, as a tensor of their own laid out like that."""

    def read() -> tuple[np.ndarray, np.ndarray | None]:
        values, steps = pair.after.read()
        shape = pair.before.shape
        own = None if steps is None else _as_before(pair, steps).reshape(shape)
        return _as_before(pair, values).reshape(shape), own

    whole = pair.after
    name = f"{whole.name}[{pair.start}:{pair.start + (pair.count or 0)}]"
    return Weight(name, pair.before.shape, whole.dtype, whole.bits, read, scaled=whole.scaled)
