"""Intermediate values of a model file, independent of its format."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

Values = Mapping[str, np.ndarray]
"""Arrays by the names of their values."""
Run = Callable[[Values], Values]
"""Function that computes values, by name, from the inputs (and given values) of one batch."""
MASK_MAGNITUDE = 1e8
"""Magnitude from which a value counts as an attention mask instead of a number."""
MIN_WEIGHT_ELEMENTS = 16
"""Number of elements below which a stored tensor counts as scales or indices instead of weights."""


@dataclass(frozen=True)
class GraphStep:
    """Operator that computes a value.

    Attributes:
        value: Name of the computed value.
        operator: Type of the operator, by the format's own name.
        name: Name of the operator.
        reads: Names of the values that it reads.
        bits: Smallest bit width that it stores or computes with; 32 for floats.
        computes: Whether the value may be floats and is more than a copy or reshape of others.
    """

    value: str
    operator: str
    name: str
    reads: Sequence[str]
    bits: int
    computes: bool = True


class ValueGraph:
    """Model file whose intermediate values can be computed, with its steps in execution order.

    A segment lies between two values at which the file is cut.
    """

    def __init__(
        self,
        steps: Iterable[GraphStep],
        outputs: Sequence[str],
        whole: Callable[[Sequence[str]], Run],
        shaped: Callable[[Sequence[Values]], list[Values]] | None = None,
    ) -> None:
        """Store the steps of a file and the functions that compute its values.

        Args:
            steps: Steps of the file in execution order.
            outputs: Names of the values that the file returns.
            whole: Function that returns a runner for values of the unchanged file.
            shaped: Function that turns batches into the file's own input names and one shape, where names are specific
                to the file; otherwise None.
        """
        self.steps = {step.value: step for step in steps}
        self.outputs, self.whole, self.shaped = outputs, whole, shaped

    @cached_property
    def reads(self) -> Mapping[str, Sequence[str]]:
        """Names of the values that each value is computed from."""
        return {name: step.reads for name, step in self.steps.items()}

    @property
    def computed(self) -> list[str]:
        """Names of the values that may be floats and are more than a copy or a reshape of other values."""
        return [name for name, step in self.steps.items() if step.computes]

    def segment(self, value: str, cuts: Collection[str]) -> list[str]:
        """Return the values between the preceding ``cuts`` and ``value``, the last one first."""
        values, seen = [value], {value}
        # The list grows while it is iterated, which makes this a breadth-first search from the end.
        for name in values:
            for read in self.reads[name]:
                if read in self.reads and read not in cuts and read not in seen:
                    seen.add(read)
                    values.append(read)
        return values

    def bits(self, cuts: Collection[str]) -> dict[str, int]:
        """Return, for each cut, the smallest bit width that the part before it stores or computes with."""
        ends = frozenset(cuts)
        return {name: min(self.steps[step_value].bits for step_value in self.segment(name, ends)) for name in cuts}


def pad_batches(batches: Sequence[Values], length: int) -> list[Values]:
    """Return batches of ids and masks [rows, tokens], padded with zeros up to ``length``."""
    return [
        {name: np.pad(array, ((0, 0), (0, length - array.shape[1]))) for name, array in batch.items()}
        for batch in batches
    ]


def longest_length(batches: Sequence[Values]) -> int | None:
    """Return the number of tokens of the longest batch, or None if not all inputs are ids and masks."""
    shapes = [array.shape for batch in batches for array in batch.values()]
    return max(shape[1] for shape in shapes) if all(len(shape) == 2 for shape in shapes) else None
