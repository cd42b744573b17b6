"""Matching of a file's values to a reference whose value names differ, by their numbers.

On one batch, a value of the file matches one of the reference if their numbers agree up to rounding, in any layout.
The reference is given the matched values of the file, so that earlier errors do not count. If matching does not
reach the outputs, a fault prevents a match: the first candidate position is tried with the file's values that are
similar or computed from the same matched values, and accepted if values behind it then match.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice, permutations

import numpy as np

from compress.formats.intermediate_values import MASK_MAGNITUDE, Run, ValueGraph, Values
from compress.formats.onnx.intermediate_values import OnnxParts

_SAME = ((32, 1e-3), (16, 0.01), (8, 0.05), (0, 0.2))
"""Minimum bits of a part, and the error up to which two values match, as a share of the value's spread."""
_ROUNDS = 20
"""Maximum number of rounds in which matched values are inserted and matched again, until early errors vanish."""
_LIKE = 0.9
"""Error up to which a value may be the same with a fault, as a share of the value's spread."""
_FEWEST = 16
"""Minimum number of elements that distinguish a value from others."""
_TRIALS = 64
"""Number of pairs that are tried for one fault, in the order of the reference's computation."""
_MOST_AXES = 4
"""Number of axes longer than 1 up to which every permutation is tried."""
_SAMPLE = 4096
"""Number of sampled elements of a large value; the positions are the same for every value of a size."""


@dataclass(frozen=True)
class Likeness:
    """Similarity of ``own`` of the file and ``value`` of the reference, up to ``error``, a share of the spread.

    ``value`` has ``shape``; in ``own`` the axes longer than 1 are permuted by ``order``, in any shape.
    """

    value: str
    own: str
    shape: tuple[int, ...]
    order: tuple[int, ...]
    error: float

    def back(self, array: np.ndarray) -> np.ndarray:
        """Return an array with the layout of ``own`` in the layout of ``value``."""
        long = _long(self.shape)
        moved = array.reshape([long[axis] for axis in self.order])
        return moved.transpose(np.argsort(self.order)).reshape(self.shape)


def orders_of(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Return every permutation of the axes longer than 1, the identity first."""
    long = range(len(_long(shape)))
    return list(permutations(long)) if len(long) <= _MOST_AXES else [tuple(long)]


def _long(shape: tuple[int, ...]) -> list[int]:
    return [size for size in shape if size > 1]


def alike(values: Values, others: Values) -> Iterator[Likeness]:
    """Yield for each value and each other of equal size the permutation with the least difference."""
    by_size: dict[int, list[str]] = defaultdict(list)
    for name, array in others.items():
        by_size[array.size].append(name)
    for value, array in values.items():
        positions, orders, long = _places(array.size), orders_of(array.shape), array.reshape(_long(array.shape))
        spread = float(array.std()) or float(np.abs(array).max()) or 1.0
        # Compare every permutation at once.
        ours = np.stack([long.transpose(order).ravel()[positions] for order in orders])
        for other in by_size[array.size]:
            squares = np.square(ours - others[other].ravel()[positions].astype(np.float64)).mean(axis=1)
            # What is left between equal numbers is the rounding of the sums, so that the first of equal orders counts.
            errors = (np.sqrt(squares) / spread).round(6)
            best = int(errors.argmin())
            yield Likeness(value, other, array.shape, orders[best], float(errors[best]))


def _places(size: int) -> np.ndarray:
    """Return the positions of the elements that are compared."""
    if size <= _SAMPLE:
        return np.arange(size)
    return np.random.default_rng(0).integers(0, size, _SAMPLE)


def match(file: ValueGraph, reference: OnnxParts, batch: Values) -> ValueGraph:
    """Return ``file`` with the reference's names for its values; the first output of both is assumed to match.

    Inputs of the result must have the shapes of ``batch``.
    """
    matching = _Matching(file, reference, batch)
    matching.know_the_same()
    # Each round accepts one pair that makes further values match.
    while not matching.leads_to_the_answers() and matching.know_by_trial():
        pass
    matched = matching.known
    names = {output.own: name for name, output in matched.items()}

    def named(own: str) -> str:
        return names.get(own, f"the file's {own}")

    def whole(values: Sequence[str]) -> Run:
        run = file.whole([matched[name].own for name in values])

        def answered(batch: Values) -> Values:
            outputs = run(batch)
            return {name: matched[name].back(outputs[matched[name].own]) for name in values}

        return answered

    steps = (replace(step, value=named(step.value), reads=list(map(named, step.reads))) for step in file.steps.values())
    return ValueGraph(steps, [names[output] for output in file.outputs if output in names], whole)


@dataclass
class _Matching:
    file: ValueGraph
    reference: OnnxParts
    batch: Values
    same: dict[str, Likeness] = field(default_factory=dict)
    held: dict[str, Likeness] = field(default_factory=dict)

    def __post_init__(self) -> None:
        outputs = self.file.whole(self.file.computed)(self.batch)
        self.own = {name: value for name, value in outputs.items() if _telling(value) or name in self.file.outputs}
        self.answer, output = self.reference.outputs[0], self.file.outputs[0]
        self.values = self._given({})
        shape = self.values[self.answer].shape
        # The outputs correspond by definition, even if they differ.
        self.held[self.answer] = Likeness(self.answer, output, shape, orders_of(shape)[0], 0.0)

    @property
    def known(self) -> dict[str, Likeness]:
        return {**self.same, **self.held}

    def know_the_same(self) -> None:
        """Insert matched values into the reference and match again, until the set of matches is stable."""
        for _ in range(_ROUNDS):
            self.values = self._given(self.known)
            matches = self._same(self.values)
            if matches.keys() == self.same.keys():
                return
            self.same = matches

    def leads_to_the_answers(self) -> bool:
        """Return True if the outputs agree when the matched values are inserted."""
        output = self.held[self.answer].own
        (likeness,) = alike({self.answer: self.values[self.answer]}, {output: self.own[output]})
        return likeness.error <= self._rounding(output)

    def know_by_trial(self) -> bool:
        """Accept the first candidate pair that makes other values match; return False if there is none."""
        old_matches = self.same.keys()
        for pair in islice(self._candidates(), _TRIALS):
            self.held[pair.value] = pair
            if self._same(self._given(self.known)).keys() - old_matches:
                self.know_the_same()
                return True
            del self.held[pair.value]
        return False

    def _given(self, known: Mapping[str, Likeness]) -> Values:
        """Return the reference's values with matched values replaced by the file's."""
        inserted = {name: likeness.back(self.own[likeness.own]) for name, likeness in known.items()}
        return self.reference.apart(self.reference.computed, list(inserted))({**self.batch, **inserted})

    def _same(self, values: Values) -> dict[str, Likeness]:
        """Return mutually best matches within rounding, excluding accepted pairs."""
        used = {likeness.own for likeness in self.held.values()}
        ours = {name: value for name, value in values.items() if name not in self.held and _telling(value)}
        theirs = {name: value for name, value in self.own.items() if name not in used}
        matches: dict[str, Likeness] = {}
        # Greedily accept the most similar pairs.
        for likeness in sorted(alike(ours, theirs), key=lambda likeness: likeness.error):
            is_free = likeness.value not in matches and likeness.own not in used
            if is_free and likeness.error <= self._rounding(likeness.own):
                used.add(likeness.own)
                matches[likeness.value] = likeness
        return matches

    def _rounding(self, own: str) -> float:
        """Return the error up to which a value of the file may match, by the bits of its part."""
        part = self.file.segment(own, {likeness.own for likeness in self.known.values()})
        # The coarsest step on the way determines the rounding error.
        bits = min(self.file.steps[likeness].bits for likeness in part)
        return next(share for least, share in _SAME if bits >= least)

    def _candidates(self) -> Iterator[Likeness]:
        """Yield candidates for unmatched values on the path to the outputs, in order of computation."""
        known, names = self.known, {likeness.own: name for name, likeness in self.known.items()}
        behind = set(self.reference.segment(self.answer, known)) - {self.answer}
        theirs = {name: value for name, value in self.own.items() if name not in names}
        sources = {name: _made_of(name, self.file, names) for name in theirs}
        # Values in order of computation: the first fault comes first.
        for name in self.reference.computed:
            if name in behind and _telling(self.values[name]):
                reference_sources = _made_of(name, self.reference, {likeness: likeness for likeness in known})
                plain = orders_of(self.values[name].shape)[0]
                for likeness in sorted(alike({name: self.values[name]}, theirs), key=lambda likeness: likeness.error):
                    if likeness.error < _LIKE or sources[likeness.own] == reference_sources:
                        yield likeness if likeness.error < _LIKE else replace(likeness, order=plain)


def _made_of(value: str, parts: ValueGraph, known: Mapping[str, str]) -> set[str]:
    """Return the matched values from which a value is computed, by the reference's names."""
    return {known[read] for step in parts.segment(value, known) for read in parts.reads[step] if read in known}


def _telling(value: np.ndarray) -> bool:
    """Return True if a value holds enough distinct floats to identify it, and is no mask."""
    if value.dtype.kind != "f" or value.size < _FEWEST or not np.abs(value).max() < MASK_MAGNITUDE:
        return False
    return bool(value.std() > 1e-6 * np.abs(value).max())
