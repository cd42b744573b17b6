"""A file taken apart at some of its values: what each part makes of given inputs, whatever format it is in.

A part is what lies between the values at which the file is cut. It takes those before it as they are given and makes
one value, so that no part's error is told again by the parts behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

Values = Mapping[str, np.ndarray]
"""Value's name -> array."""
Run = Callable[[Values], Values]
"""What answers one batch: inputs (and values that are given), by name, become values."""


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
