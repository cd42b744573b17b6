"""A file taken apart at some of its values: what each part makes of given inputs, whatever format it is in.

A part is what lies between the values at which the file is cut. It takes those before it as they are given and makes
one value, so that no part's error is told again by the parts behind it.
"""

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

    def apart(self, cuts: Mapping[str, np.ndarray], given: Sequence[str] | None = None) -> Run:
        """The file cut at the values ``given`` (by default all of ``cuts``), giving the values ``cuts``.

        A batch holds the inputs and what is given in place of each such value. Behind names stand examples of their
        values, for types and shapes.
        """

    def bits(self, cuts: Sequence[str]) -> Mapping[str, int]:
        """The fewest bits of a number that the part before each cut stores or computes with: 32 where all is float."""


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
    computes: bool


class Steps:
    """How the values of a file are made."""

    def __init__(self, steps: Iterable[Step]) -> None:
        self.by_value = {step.value: step for step in steps}
        self.reads = {step.value: step.reads for step in self.by_value.values()}
        self.makers = {one.value: Maker(one.operator, one.value) for one in self.by_value.values() if one.computes}

    def bits(self, cuts: Sequence[str]) -> dict[str, int]:
        """See `Parts`."""
        ends = frozenset(cuts)
        return {name: min(self.by_value[one].bits for one in part_of(name, self.reads, ends)) for name in cuts}


@runtime_checkable
class NamelessParts(Protocol):
    """A file whose values have names of its own, which no other file knows."""

    steps: Steps

    @property
    def outputs(self) -> Sequence[str]:
        """The values that are the file's answers."""

    def shaped(self, batches: Sequence[Values]) -> list[Values]:
        """The same batches as it takes them, all of one shape."""

    def run(self, values: Sequence[str], given: Sequence[str] = ()) -> Run:
        """The file giving ``values`` of it, where a batch holds those that are ``given`` beside the inputs."""


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
