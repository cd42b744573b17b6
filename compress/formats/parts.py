"""The values within a file, whatever format it is in."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

Values = Mapping[str, np.ndarray]
"""Value's name -> array."""
Run = Callable[[Values], Values]
"""What answers one batch: inputs (and values that are given), by name, become values."""
LARGEST = 1e8
"""Magnitude of a value that is a mask and no number."""


@dataclass(frozen=True)
class Maker:
    """The operator that makes a value, by the format's own words."""

    operator: str
    name: str


class Parts(Protocol):
    """A file whose values have names."""

    @property
    def makers(self) -> Mapping[str, Maker]:
        """Every value that has a name, in the order in which they are made."""

    @property
    def outputs(self) -> Sequence[str]:
        """The values that are the file's answers."""

    def whole(self, values: Sequence[str]) -> Run:
        """The file as it is, giving ``values`` of it."""

    def bits(self, cuts: Sequence[str]) -> Mapping[str, int]:
        """The fewest bits of a number that the part before each cut stores or computes with: 32 where all is float.

        A part is what lies between the values at which the file is cut.
        """


@dataclass(frozen=True)
class Step:
    """What makes ``value`` of those that it ``reads``: an ``operator``, by the format's own words.

    ``bits`` are the fewest of a number that it stores or computes with: 32 where all is float. ``computes``: the value
    is floats, and more than others in another place or shape.
    """

    value: str
    operator: str
    reads: Sequence[str]
    bits: int
    computes: bool = True


class Steps:
    """How the values of a file are made."""

    def __init__(self, steps: Iterable[Step]) -> None:
        self._by_value = {step.value: step for step in steps}
        self.reads = {name: step.reads for name, step in self._by_value.items()}
        self.makers = {name: Maker(one.operator, name) for name, one in self._by_value.items() if one.computes}

    def bits(self, cuts: Sequence[str]) -> dict[str, int]:
        """See `Parts`."""
        ends = frozenset(cuts)
        return {name: min(self._by_value[one].bits for one in part_of(name, self.reads, ends)) for name in cuts}


@runtime_checkable
class NamelessParts(Protocol):
    """A file whose values have names of its own, which no other file knows; their makers are those of its ``steps``."""

    steps: Steps

    @property
    def outputs(self) -> Sequence[str]:
        """See `Parts`."""

    def whole(self, values: Sequence[str]) -> Run:
        """See `Parts`."""

    def shaped(self, batches: Sequence[Values]) -> list[Values]:
        """The same batches as it takes them, all of one shape."""


def part_of(value: str, reads: Mapping[str, Sequence[str]], cuts: Collection[str]) -> list[str]:
    """The values from the ``cuts`` before it up to ``value``, the last first; ``reads``: what each is made of."""
    found, seen = [value], {value}
    for one in found:
        for read in reads[one]:
            if read in reads and read not in cuts and read not in seen:
                seen.add(read)
                found.append(read)
    return found


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
