"""Lazily computed examples: one by one, merged input by input, or concatenated."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

if TYPE_CHECKING:
    import numpy as np


class OnDemand(Sequence["Mapping[str, np.ndarray]"]):
    """Sequence of examples that are computed on access."""

    @abstractmethod
    def some(self, which: slice) -> Sequence[Mapping[str, np.ndarray]]:
        """Return the examples of a slice, in its order."""

    @overload
    def __getitem__(self, index: int) -> Mapping[str, np.ndarray]: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Mapping[str, np.ndarray]]: ...
    def __getitem__(self, index: int | slice) -> Mapping[str, np.ndarray] | Sequence[Mapping[str, np.ndarray]]:
        if isinstance(index, slice):
            return self.some(index)
        position = range(len(self))[index]
        return self.some(slice(position, position + 1))[0]


class Joined(OnDemand):
    """Examples with additional inputs for each."""

    def __init__(self, inputs: Sequence[Mapping[str, Any]], more: Sequence[Mapping[str, Any]]) -> None:
        self._inputs, self._more = inputs, more

    def __len__(self) -> int:
        return len(self._inputs)

    def some(self, which: slice) -> Sequence[Mapping[str, np.ndarray]]:
        """Return the merged inputs of a slice."""
        return [{**more, **example} for more, example in zip(self._more[which], self._inputs[which], strict=True)]

    def more(self, index: int) -> Mapping[str, np.ndarray]:
        """Return the additional inputs of an example without computing the others."""
        return self._more[index]


class Chained(OnDemand):
    """Concatenation of two sequences of examples."""

    def __init__(self, first: Sequence[Mapping[str, np.ndarray]], second: Sequence[Mapping[str, np.ndarray]]) -> None:
        self._first, self._second = first, second

    def __len__(self) -> int:
        return len(self._first) + len(self._second)

    def some(self, which: slice) -> Sequence[Mapping[str, np.ndarray]]:
        """Return the examples of a slice from either sequence."""
        count = len(self._first)
        positions = range(*which.indices(len(self)))
        return [self._first[position] if position < count else self._second[position - count] for position in positions]
