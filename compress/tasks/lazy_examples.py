"""Examples that are made as they are asked for: one by one, side by side, or one list behind the other."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

if TYPE_CHECKING:
    import numpy as np


class OnDemand(Sequence["Mapping[str, np.ndarray]"]):
    """Examples that are made when they are asked for."""

    @abstractmethod
    def some(self, which: slice) -> Sequence[Mapping[str, np.ndarray]]:
        """Those of ``which``, in its order."""

    @overload
    def __getitem__(self, index: int) -> Mapping[str, np.ndarray]: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Mapping[str, np.ndarray]]: ...
    def __getitem__(self, index: int | slice) -> Mapping[str, np.ndarray] | Sequence[Mapping[str, np.ndarray]]:
        if isinstance(index, slice):
            return self.some(index)
        place = range(len(self))[index]
        return self.some(slice(place, place + 1))[0]


class Joined(OnDemand):
    """Examples with more of each beside what a model is given."""

    def __init__(self, inputs: Sequence[Mapping[str, Any]], more: Sequence[Mapping[str, Any]]) -> None:
        self._inputs, self._more = inputs, more

    def __len__(self) -> int:
        return len(self._inputs)

    def some(self, which: slice) -> Sequence[Mapping[str, np.ndarray]]:
        """Both parts of each."""
        return [{**more, **own} for more, own in zip(self._more[which], self._inputs[which], strict=True)]

    def more(self, index: int) -> Mapping[str, np.ndarray]:
        """What stands beside the pixels of an example, without making them."""
        return self._more[index]


class Chained(OnDemand):
    """Two lists, one behind the other."""

    def __init__(self, first: Sequence[Mapping[str, np.ndarray]], second: Sequence[Mapping[str, np.ndarray]]) -> None:
        self._first, self._second = first, second

    def __len__(self) -> int:
        return len(self._first) + len(self._second)

    def some(self, which: slice) -> Sequence[Mapping[str, np.ndarray]]:
        """Of either list."""
        count = len(self._first)
        places = range(*which.indices(len(self)))
        return [self._first[place] if place < count else self._second[place - count] for place in places]
