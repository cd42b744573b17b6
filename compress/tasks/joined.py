"""Examples of two parts, side by side or one list behind the other, of which each is made as it is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

if TYPE_CHECKING:
    import numpy as np


class Joined(Sequence["Mapping[str, np.ndarray]"]):
    """Examples with more of each beside what a model is given."""

    def __init__(self, inputs: Sequence[Mapping[str, Any]], more: Sequence[Mapping[str, Any]]) -> None:
        self._inputs, self._more = inputs, more

    def __len__(self) -> int:
        return len(self._inputs)

    @overload
    def __getitem__(self, index: int) -> Mapping[str, np.ndarray]: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Mapping[str, np.ndarray]]: ...
    def __getitem__(self, index: int | slice) -> Mapping[str, np.ndarray] | Sequence[Mapping[str, np.ndarray]]:
        if isinstance(index, slice):
            return Joined(self._inputs[index], self._more[index])
        return {**self._more[index], **self._inputs[index]}

    def more(self, index: int) -> Mapping[str, np.ndarray]:
        """What stands beside the pixels of an example, without making them."""
        return self._more[index]


class Chained(Sequence["Mapping[str, np.ndarray]"]):
    """Two lists, one behind the other."""

    def __init__(self, first: Sequence[Mapping[str, np.ndarray]], second: Sequence[Mapping[str, np.ndarray]]) -> None:
        self._first, self._second = first, second

    def __len__(self) -> int:
        return len(self._first) + len(self._second)

    @overload
    def __getitem__(self, index: int) -> Mapping[str, np.ndarray]: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Mapping[str, np.ndarray]]: ...
    def __getitem__(self, index: int | slice) -> Mapping[str, np.ndarray] | Sequence[Mapping[str, np.ndarray]]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        count = len(self._first)
        return self._first[index] if index < count else self._second[index - count]
