"""The values within a file, whatever format it is in."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

Values = Mapping[str, np.ndarray]
"""Value's name -> array."""
Run = Callable[[Values], Values]
"""What answers one batch: inputs (and values that are given), by name, become values."""
LARGEST = 1e8
"""Magnitude of a value that is a mask and no number."""
FEW = 16
"""Elements below which a stored tensor holds scales or indices, and no weights."""


@dataclass(frozen=True)
class Step:
    """What makes ``value`` of those that it ``reads``: an ``operator``, by the format's own words, and its ``name``.

    ``bits`` are the fewest of a number that it stores or computes with: 32 where all is float. ``computes``: the value
    may be floats, and more than others in another place or shape.
    """

    value: str
    operator: str
    name: str
    reads: Sequence[str]
    bits: int
    computes: bool = True


class Parts:
    """A file whose values can be looked at, with the steps that make them, in their order.

    A part is what lies between the values at which the file is cut.
    """

    def __init__(
        self,
        steps: Iterable[Step],
        outputs: Sequence[str],
        whole: Callable[[Sequence[str]], Run],
        shaped: Callable[[Sequence[Values]], list[Values]] | None = None,
    ) -> None:
        """``outputs`` are its answers; ``whole`` gives values of the file as it is.

        Where names are the file's own, which no other file knows, ``shaped`` makes batches as it takes them, all of one
        shape.
        """
        self.steps = {step.value: step for step in steps}
        self.outputs, self.whole, self.shaped = outputs, whole, shaped

    @cached_property
    def reads(self) -> Mapping[str, Sequence[str]]:
        """What each value is made of."""
        return {name: step.reads for name, step in self.steps.items()}

    @property
    def computed(self) -> list[str]:
        """Values that are more than others in another place or shape."""
        return [name for name, step in self.steps.items() if step.computes]

    def part(self, value: str, cuts: Collection[str]) -> list[str]:
        """The values from the ``cuts`` before it up to ``value``, the last first."""
        found, seen = [value], {value}
        for one in found:
            for read in self.reads[one]:
                if read in self.reads and read not in cuts and read not in seen:
                    seen.add(read)
                    found.append(read)
        return found

    def bits(self, cuts: Collection[str]) -> dict[str, int]:
        """The fewest bits of a number that the part before each cut stores or computes with."""
        ends = frozenset(cuts)
        return {name: min(self.steps[one].bits for one in self.part(name, ends)) for name in cuts}


def padded(batches: Sequence[Values], length: int) -> list[Values]:
    """Batches of ids and masks [rows, tokens], with zeros behind them up to ``length``."""
    return [
        {name: np.pad(array, ((0, 0), (0, length - array.shape[1]))) for name, array in batch.items()}
        for batch in batches
    ]


def longest(batches: Sequence[Values]) -> int | None:
    """Tokens of the longest batch; None where not all inputs are ids and masks."""
    shapes = [array.shape for batch in batches for array in batch.values()]
    return max(shape[1] for shape in shapes) if all(len(shape) == 2 for shape in shapes) else None
