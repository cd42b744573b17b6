"""A file whose values have no names that the reference knows: they are found by their numbers.

On one batch a value of the file is the reference's where their numbers are the same but for rounding, in whatever
layout. The reference is given the file's values that are known, so that errors from before don't count. Where that
doesn't lead to the answers, a fault keeps values from being known: the first that it may be in is tried with the file's
values that are like it or are made of the same known ones, and held where values behind it become known by that.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice, permutations

import numpy as np

from compress.formats.onnx.intermediate_values import OnnxParts
from compress.formats.parts import LARGEST, Parts, Run, Step, Values

_SAME = ((32, 1e-3), (16, 0.01), (8, 0.05), (0, 0.2))
"""Share of a value's spread up to which two values are one, where a part has that many bits or more."""
_ROUNDS = 20
"""How often at most what is known is given, and known anew; errors that come from before are gone then."""
_LIKE = 0.9
"""Share of a value's spread up to which another may be the same with a fault."""
_FEWEST = 16
"""Elements that tell a value from another."""
_TRIALS = 64
"""Pairs that are tried for one fault, in the order in which the reference makes their values."""
_MOST_AXES = 4
"""Axes longer than 1 up to which every order of them is looked at."""
_SAMPLE = 4096
"""Numbers of a large value that are looked at; they are drawn once for all, the same for every value of a size."""


@dataclass(frozen=True)
class Likeness:
    """``own`` of the file holds the numbers of ``value``, but for ``error``, a share of its spread.

    ``value`` has ``shape``; in ``own`` the axes that are longer than 1 come in another ``order``, in whatever shape.
    """

    value: str
    own: str
    shape: tuple[int, ...]
    order: tuple[int, ...]
    error: float

    def back(self, array: np.ndarray) -> np.ndarray:
        """An array laid out as ``own``, as ``value`` is."""
        long = _long(self.shape)
        moved = array.reshape([long[axis] for axis in self.order])
        return moved.transpose(np.argsort(self.order)).reshape(self.shape)


def orders_of(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Every order of the axes longer than 1, the plainest first."""
    long = range(len(_long(shape)))
    return list(permutations(long)) if len(long) <= _MOST_AXES else [tuple(long)]


def _long(shape: tuple[int, ...]) -> list[int]:
    return [size for size in shape if size > 1]


def alike(values: Values, others: Values) -> Iterator[Likeness]:
    """For each value and other of one size, that order of axes in which they differ least."""
    by_size: dict[int, list[str]] = defaultdict(list)
    for name, array in others.items():
        by_size[array.size].append(name)
    for value, array in values.items():
        places, orders, long = _places(array.size), orders_of(array.shape), array.reshape(_long(array.shape))
        spread = float(array.std()) or float(np.abs(array).max()) or 1.0
        ours = np.stack([long.transpose(order).ravel()[places] for order in orders])
        for own in by_size[array.size]:
            squares = np.square(ours - others[own].ravel()[places].astype(np.float64)).mean(axis=1)
            # What is left between equal numbers is the rounding of the sums, so that the first of equal orders counts.
            errors = (np.sqrt(squares) / spread).round(6)
            best = int(errors.argmin())
            yield Likeness(value, own, array.shape, orders[best], float(errors[best]))


def _places(size: int) -> np.ndarray:
    """Which numbers are looked at."""
    if size <= _SAMPLE:
        return np.arange(size)
    return np.random.default_rng(0).integers(0, size, _SAMPLE)


def match(file: Parts, reference: OnnxParts, batch: Values) -> Parts:
    """``file`` by the names that ``reference`` has for its values, of which the answers' first are known to be one.

    Whatever the result is given must have the shapes of ``batch``.
    """
    matching = _Matching(file, reference, batch)
    matching.know_the_same()
    while not matching.leads_to_the_answers() and matching.know_by_trial():
        pass
    known = matching.known
    names = {one.own: name for name, one in known.items()}

    def named(own: str) -> str:
        return names.get(own, f"the file's {own}")

    def step(one: Step) -> Step:
        return replace(one, value=named(one.value), reads=list(map(named, one.reads)))

    def whole(values: Sequence[str]) -> Run:
        run = file.whole([known[name].own for name in values])

        def answered(batch: Values) -> Values:
            found = run(batch)
            return {name: known[name].back(found[known[name].own]) for name in values}

        return answered

    return Parts(map(step, file.steps.values()), [names[one] for one in file.outputs if one in names], whole)


@dataclass
class _Matching:
    file: Parts
    reference: OnnxParts
    batch: Values
    same: dict[str, Likeness] = field(default_factory=dict)
    held: dict[str, Likeness] = field(default_factory=dict)

    def __post_init__(self) -> None:
        found = self.file.whole(self.file.computed)(self.batch)
        self.own = {name: value for name, value in found.items() if _telling(value) or name in self.file.outputs}
        self.answer, own = self.reference.outputs[0], self.file.outputs[0]
        self.values = self._given({})
        shape = self.values[self.answer].shape
        self.held[self.answer] = Likeness(self.answer, own, shape, orders_of(shape)[0], 0.0)

    @property
    def known(self) -> dict[str, Likeness]:
        return {**self.same, **self.held}

    def know_the_same(self) -> None:
        """Give the reference what is known, and know what is the same then, until that changes no more."""
        for _ in range(_ROUNDS):
            self.values = self._given(self.known)
            found = self._same(self.values)
            if found.keys() == self.same.keys():
                return
            self.same = found

    def leads_to_the_answers(self) -> bool:
        """Whether the answers are the same where the reference is given what is known."""
        own = self.held[self.answer].own
        (found,) = alike({self.answer: self.values[self.answer]}, {own: self.own[own]})
        return found.error <= self._rounding(own)

    def know_by_trial(self) -> bool:
        """Hold the first pair by which others become known; whether there is any."""
        before = self.same.keys()
        for pair in islice(self._candidates(), _TRIALS):
            self.held[pair.value] = pair
            if self._same(self._given(self.known)).keys() - before:
                self.know_the_same()
                return True
            del self.held[pair.value]
        return False

    def _given(self, known: Mapping[str, Likeness]) -> Values:
        """The reference's values where those that are known are the file's."""
        given = {name: one.back(self.own[one.own]) for name, one in known.items()}
        return self.reference.apart(self.reference.computed, list(given))({**self.batch, **given})

    def _same(self, values: Values) -> dict[str, Likeness]:
        """Pairs of which each is the other's likeliest, none of them held."""
        taken = {one.own for one in self.held.values()}
        ours = {name: value for name, value in values.items() if name not in self.held and _telling(value)}
        theirs = {name: value for name, value in self.own.items() if name not in taken}
        found: dict[str, Likeness] = {}
        for one in sorted(alike(ours, theirs), key=lambda one: one.error):
            if one.value not in found and one.own not in taken and one.error <= self._rounding(one.own):
                taken.add(one.own)
                found[one.value] = one
        return found

    def _rounding(self, own: str) -> float:
        """The error up to which a value of the file may be the reference's, by the bits of its part."""
        part = self.file.part(own, {one.own for one in self.known.values()})
        bits = min(self.file.steps[one].bits for one in part)
        return next(share for least, share in _SAME if bits >= least)

    def _candidates(self) -> Iterator[Likeness]:
        """For the values that lead to the answers unknown, in order, what is like them, or is made of the same."""
        known, names = self.known, {one.own: name for name, one in self.known.items()}
        behind = set(self.reference.part(self.answer, known)) - {self.answer}
        theirs = {name: value for name, value in self.own.items() if name not in names}
        made = {name: _made_of(name, self.file, names) for name in theirs}
        for name in self.reference.computed:
            if name in behind and _telling(self.values[name]):
                before = _made_of(name, self.reference, {one: one for one in known})
                plain = orders_of(self.values[name].shape)[0]
                for one in sorted(alike({name: self.values[name]}, theirs), key=lambda one: one.error):
                    if one.error < _LIKE or made[one.own] == before:
                        yield one if one.error < _LIKE else replace(one, order=plain)


def _made_of(value: str, parts: Parts, known: Mapping[str, str]) -> set[str]:
    """The known values that a value is made of, by the reference's names."""
    return {known[read] for made in parts.part(value, known) for read in parts.reads[made] if read in known}


def _telling(value: np.ndarray) -> bool:
    """Whether a value is floats that tell it from others, and no mask."""
    if value.dtype.kind != "f" or value.size < _FEWEST or not np.abs(value).max() < LARGEST:
        return False
    return bool(value.std() > 1e-6 * np.abs(value).max())
