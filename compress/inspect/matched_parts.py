"""A file whose values have no names that the reference knows: they are found by what they are.

On one batch a value of the file is the reference's where their numbers are the same but for rounding, in whatever
layout. What is found is given the reference's values, so that what lies behind a fault is found too. Where nothing
more is, values stay that a fault keeps from being known: of those that correlate, or are made of the same known values,
a pair is tried, and kept if it makes values behind it known.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import permutations

import numpy as np

from compress.formats.onnx.parts import OnnxParts
from compress.formats.parts import LARGEST, Maker, NamelessParts, Run, Values, part_of

_SAME = 0.05
"""Share of a value's spread up to which two values are one, but for what 8 bits make of it."""
_ROUNDS = 20
"""How often at most what is known is given, and known anew; errors that come from before are gone then."""
_FEWEST = 16
"""Elements that tell a value from another."""
_LIKE = 0.5
"""Correlation below which numbers do not tell how a value is laid out."""
_TRIALS = 24
"""Pairs of one place that are tried, the likeliest first."""
_MOST_AXES = 4
"""Axes longer than 1 up to which every order of them is looked at."""
_SAMPLE = 4096
"""Numbers of a large value that are looked at; they are drawn once for all, the same for every value of a size."""
_TINY = 1e-30


@dataclass(frozen=True)
class Layout:
    """The axes of ``shape`` that are longer than 1 in another ``order``, and all of it as ``other``."""

    shape: tuple[int, ...]
    order: tuple[int, ...]
    other: tuple[int, ...]

    def there(self, array: np.ndarray) -> np.ndarray:
        """An array of ``shape``, laid out as ``other``."""
        return array.reshape(self._long()).transpose(self.order).reshape(self.other)

    def back(self, array: np.ndarray) -> np.ndarray:
        """An array of ``other``, laid out as ``shape``."""
        long = self._long()
        moved = array.reshape([long[axis] for axis in self.order])
        return moved.transpose(np.argsort(self.order)).reshape(self.shape)

    def _long(self) -> list[int]:
        return [size for size in self.shape if size > 1]


def orders_of(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Every order of the axes longer than 1, the plainest first."""
    long = range(len([size for size in shape if size > 1]))
    return list(permutations(long)) if len(long) <= _MOST_AXES else [tuple(long)]


@dataclass(frozen=True)
class Likeness:
    """``other`` holds the numbers of ``value`` in ``layout``, but for ``error``, a share of the value's spread.

    ``correlation`` is what remains of likeness if they may have another scale and mean.
    """

    value: str
    other: str
    layout: Layout
    error: float
    correlation: float


def alike(values: Mapping[str, np.ndarray], others: Mapping[str, np.ndarray]) -> list[Likeness]:
    """For each value and other of one size, that layout in which they differ least."""
    by_size: dict[int, list[str]] = defaultdict(list)
    for name, array in others.items():
        by_size[array.size].append(name)
    found: list[Likeness] = []
    for name, array in values.items():
        names = by_size[array.size]
        if names:
            found += _alike(name, array, {one: others[one] for one in names})
    return found


def _alike(name: str, array: np.ndarray, others: Mapping[str, np.ndarray]) -> Iterator[Likeness]:
    orders, places = orders_of(array.shape), _places(array.size)
    flat = [Layout(array.shape, order, (array.size,)) for order in orders]
    ours = np.stack([one.there(array)[places] for one in flat]).astype(np.float64)
    theirs = np.stack([other.ravel()[places] for other in others.values()]).astype(np.float64)
    count, spread = len(places), max(float(array.std()), _TINY)
    squares = (theirs**2).sum(axis=1) - 2 * ours @ theirs.T + (ours**2).sum(axis=1, keepdims=True)
    errors = np.sqrt(np.maximum(squares, 0) / count) / spread
    same = _unit(ours) @ _unit(theirs).T
    # What is left between equal numbers is the rounding of the sums, so that the first of equal layouts is taken.
    best = errors.round(6).argmin(axis=0)
    for place, (other, held) in enumerate(others.items()):
        way = int(best[place])
        layout = Layout(array.shape, orders[way], held.shape)
        yield Likeness(name, other, layout, round(float(errors[way, place]), 6), float(same[way, place]))


def _places(size: int) -> np.ndarray:
    """Which numbers are looked at."""
    if size <= _SAMPLE:
        return np.arange(size)
    return np.random.default_rng(0).integers(0, size, _SAMPLE)


def _unit(rows: np.ndarray) -> np.ndarray:
    """Each row less its mean, of length 1."""
    centred = rows - rows.mean(axis=1, keepdims=True)
    unit: np.ndarray = centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), _TINY)
    return unit


@dataclass(frozen=True)
class MatchedParts:
    """``file`` by the names that its reference has for its values, as far as they are known."""

    file: NamelessParts
    known: Mapping[str, tuple[str, Layout]]
    """The reference's name -> the file's own, and how it lays the value out."""

    @property
    def makers(self) -> Mapping[str, Maker]:
        """See `Parts`."""
        return {name: self.file.steps.makers[own] for name, (own, _) in self.known.items()}

    @property
    def outputs(self) -> Sequence[str]:
        """See `Parts`."""
        own = set(self.file.outputs)
        return [name for name, (one, _) in self.known.items() if one in own]

    def whole(self, values: Sequence[str]) -> Run:
        """See `Parts`."""
        return self._run(values, ())

    def apart(self, cuts: Mapping[str, np.ndarray], given: Sequence[str] | None = None) -> Run:
        """See `Parts`."""
        return self._run(list(cuts), list(cuts) if given is None else given)

    def bits(self, cuts: Sequence[str]) -> Mapping[str, int]:
        """See `Parts`."""
        found = self.file.steps.bits([self.known[name][0] for name in cuts])
        return {name: found[self.known[name][0]] for name in cuts}

    def _run(self, values: Sequence[str], given: Sequence[str]) -> Run:
        own = {name: self.known[name] for name in (*values, *given)}
        run = self.file.run([own[name][0] for name in values], [own[name][0] for name in given])

        def answered(batch: Values) -> Values:
            found = run({**batch, **{own[name][0]: own[name][1].there(batch[name]) for name in given}})
            return {name: own[name][1].back(found[own[name][0]]) for name in values}

        return answered


def match(file: NamelessParts, reference: OnnxParts, batch: Values) -> MatchedParts:
    """``file`` by the names that ``reference`` has for its values, of which the answers' first are known to be one.

    Whatever the result is given must have the shapes of ``batch``.
    """
    values = reference.whole(reference.computed)(batch)
    matching = _Matching(file, {name: one for name, one in values.items() if _telling(one)}, reference.reads, batch)
    answer, own = reference.outputs[0], file.outputs[0]
    shape = values[answer].shape
    matching.held[answer] = own, Layout(shape, orders_of(shape)[0], matching.own[own].shape)
    matching.know_the_same()
    while matching.know_by_trial():
        matching.know_the_same()
    return MatchedParts(file, {name: matching.known[name] for name in values if name in matching.known})


@dataclass
class _Matching:
    file: NamelessParts
    values: Mapping[str, np.ndarray]
    reads: Mapping[str, Sequence[str]]
    batch: Values
    same: dict[str, tuple[str, Layout]] = field(default_factory=dict)
    held: dict[str, tuple[str, Layout]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.own: Values = self.file.run(list(self.file.steps.makers))(self.batch)

    @property
    def known(self) -> dict[str, tuple[str, Layout]]:
        return {**self.same, **self.held}

    def know_the_same(self) -> None:
        """Give what is known its reference's values and know what is the same then, until that changes no more."""
        for _ in range(_ROUNDS):
            self.own = self._given(self.known)
            found = {one.value: (one.other, one.layout) for one in self._same(self.own, self.held)}
            if found == self.same:
                return
            self.same = found

    def know_by_trial(self) -> bool:
        """Hold that pair by which most behind it becomes known; whether there is any."""
        for pairs in self._candidates():
            tried = [(self._gain(pair), -at, pair) for at, pair in enumerate(pairs)]
            gain, _, best = max(tried, key=lambda one: one[:2])
            if gain > 0:
                self.held[best.value] = best.other, best.layout
                return True
        return False

    def _given(self, known: Mapping[str, tuple[str, Layout]]) -> Values:
        """All of the file's values where those that are known are the reference's."""
        given = {own: layout.there(self.values[name]) for name, (own, layout) in known.items() if name in self.values}
        return self.file.run(list(self.own), list(given))({**self.batch, **given})

    def _same(self, own: Values, known: Mapping[str, tuple[str, Layout]]) -> Iterator[Likeness]:
        """Pairs of which each is the other's likeliest, none of them in ``known``."""
        values, others = self._unknown(own, known)
        seen: set[str] = set()
        for one in sorted(alike(values, others), key=lambda one: one.error):
            if one.error > _SAME:
                return
            if one.value not in seen and one.other not in seen:
                seen.update((one.value, one.other))
                yield one

    def _unknown(self, own: Values, known: Mapping[str, tuple[str, Layout]]) -> tuple[Values, Values]:
        taken = {one for one, _ in known.values()}
        values = {name: value for name, value in self.values.items() if name not in known}
        return values, {name: value for name, value in own.items() if name not in taken and _telling(value)}

    def _candidates(self) -> Iterator[list[Likeness]]:
        """For one value after the other, what may be it, and what else that may be; the likeliest first."""
        values, others = self._unknown(self.own, self.known)
        pairs = alike(values, others)
        like = [one for one in pairs if abs(one.correlation) > _LIKE]
        known_by = {own: name for name, (own, _) in self.known.items()}
        made = {one: self._made_of(one, self.reads, {name: name for name in self.known}) for one in values}
        theirs = {one: self._made_of(one, self.file.steps.reads, known_by) for one in others}
        unlike = [one for one in pairs if abs(one.correlation) <= _LIKE and made[one.value] == theirs[one.other]]
        for value in values:
            own = {one.other for one in (*like, *unlike) if one.value == value}
            near = sorted((one for one in like if one.other in own), key=lambda one: -round(abs(one.correlation), 3))
            far = sorted(_in_every_layout(one for one in unlike if one.other in own), key=_plainness)
            if own:
                yield [*near, *far][:_TRIALS]

    def _made_of(self, one: str, reads: Mapping[str, Sequence[str]], known_by: Mapping[str, str]) -> frozenset[str]:
        """The known values that a value is made of, by the reference's names."""
        read = {read for made in part_of(one, reads, known_by) for read in reads[made]}
        return frozenset(known_by[one] for one in read if one in known_by)

    def _gain(self, pair: Likeness) -> float:
        known = {**self.known, pair.value: (pair.other, pair.layout)}
        before = {one.value for one in self._same(self.own, known)}
        return sum(1 - one.error / _SAME for one in self._same(self._given(known), known) if one.value not in before)


def _in_every_layout(pairs: Iterable[Likeness]) -> Iterator[Likeness]:
    for one in pairs:
        for order in orders_of(one.layout.shape):
            yield replace(one, layout=replace(one.layout, order=order))


def _plainness(one: Likeness) -> int:
    return orders_of(one.layout.shape).index(one.layout.order)


def _telling(value: np.ndarray) -> bool:
    """Whether a value is floats that tell it from others, and no mask."""
    if value.dtype.kind != "f" or value.size < _FEWEST or not np.abs(value).max() < LARGEST:
        return False
    return bool(value.std() > 1e-6 * np.abs(value).max())
