"""Which tensor of one model is which of another's: by name, and where names don't say it, by content."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import product

import numpy as np

from compress.inspection.layers import model_prefix
from compress.plugins.diff.dequantize import Weight
from compress.plugins.diff.fingerprints import FEWEST, Profile, likely, rows_alike
from compress.plugins.diff.pairs import Pair, rows_of

_ROW_ALIKE = 0.9
"""Median correlation of rows from which integers are the rounding of floats."""


@dataclass(frozen=True)
class Matches:
    """``extra``: what stands in the second model once more; ``resized`` has one name, and another shape.

    ``folded``: what a graph has no need to store, with what became of it. ``turned``: the pairs' first is the second's.
    """

    pairs: tuple[Pair, ...]
    removed: tuple[Weight, ...]
    added: tuple[Weight, ...]
    resized: tuple[tuple[Weight, Weight], ...]
    extra: tuple[Pair, ...] = ()
    folded: tuple[str, ...] = ()
    turned: bool = False

    @property
    def lacking(self) -> int:
        """Tensors without another."""
        return len(self.removed) + len(self.added) + len(self.resized)


def match(before: Mapping[str, Weight], after: Mapping[str, Weight], same_layout: bool) -> Matches:
    """Pair the tensors of two models. With ``same_layout`` a name and a shape in common are enough to know one.

    Of two formats it is seen which holds the other's tensors side by side or added up: pairs are looked for both ways.
    """
    found = _Matching(dict(before), dict(after), same_layout).found()
    if same_layout or not found.lacking:
        return found
    turned = _Matching(dict(after), dict(before), same_layout).found()
    if turned.lacking >= found.lacking:
        return found
    resized = tuple((one, other) for other, one in turned.resized)
    return replace(turned, added=turned.removed, removed=turned.added, resized=resized, turned=True)


@dataclass
class _Matching:
    before: dict[str, Weight]
    after: dict[str, Weight]
    same_layout: bool
    pairs: list[Pair] = field(default_factory=list)
    resized: list[tuple[Weight, Weight]] = field(default_factory=list)
    folded: list[str] = field(default_factory=list)
    _profiles: dict[Weight, Profile] = field(default_factory=dict)

    def found(self) -> Matches:
        names = self._common_names()
        if self.same_layout:
            for old, new in names.items():
                one, other = self.before[old], self.after[new]
                # Integers may lie the other way round than the floats that they are made of.
                if one.shape == other.shape and one.dtype == other.dtype:
                    self._take(Pair(one, other, "name"))
        self._by_content(names)
        self._parts_of_the_first(names)
        for old, new in names.items():
            if old in self.before and new in self.after:
                self._by_name_alone(old, new)
        if not self.same_layout:
            self._sums()
            self._turned(names)
            self._integers_alone()
            self._constants()
            self._own_of_graphs()
        extra = tuple(self._again())
        gone = {pair.after.name for pair in extra}
        added = tuple(one for name, one in self.after.items() if name not in gone)
        removed = tuple(self.before.values())
        return Matches(tuple(self.pairs), removed, added, tuple(self.resized), extra, tuple(self.folded))

    def _turned(self, names: Mapping[str, str]) -> None:
        """What stands side by side in the second may be laid out the other way round in the first."""
        kept = dict(self.before)
        self.before = {name: one.transposed() for name, one in kept.items()}
        self._by_content(names)
        self._parts_of_the_first(names)
        self.before = {name: kept[name] for name in self.before}

    def _parts_of_the_first(self, names: Mapping[str, str]) -> None:
        """Tensors of the second that stand side by side in one of the first: its rows are told apart by theirs."""
        turned = _Matching(dict(self.after), dict(self.before), False)
        turned._by_content({})
        spans: dict[str, int] = defaultdict(int)
        for pair in turned.pairs:
            if pair.count is not None and names.get(pair.after.name) != pair.before.name:
                whole, part = pair.after, pair.before
                spans[whole.name] += pair.count
                self.pairs.append(Pair(rows_of(pair), part, "content"))
                del self.after[part.name]
        for name, count in spans.items():
            if count in self.before[name].shape:
                del self.before[name]

    def _sums(self) -> None:
        """Tables to each row of which a row of another was added, as exporters do with the only type of token."""
        tables = [one for one in self.before.values() if len(one.shape) == 2]
        for before, after in product(tables, [*self.after.values()]):
            if before.shape != after.shape or before.name not in self.before or after.name not in self.after:
                continue
            old, new = (np.concatenate(list(one.chunks())) for one in (before, after))
            row = (new - old).mean(axis=0)
            if np.linalg.norm(new - old - row) > 0.05 * np.linalg.norm(old):
                continue
            for other in [one for one in tables if one is not before and one.shape[1] == len(row)]:
                apart = np.linalg.norm(np.concatenate(list(other.chunks())) - row, axis=1)
                if apart.min() <= 0.05 * np.linalg.norm(row):
                    self._take(
                        Pair(before, after, "content", plus=np.concatenate(list(other.chunks()))[apart.argmin()])
                    )
                    self.folded.append(f"row {apart.argmin()} of {other.name} is added to {before.name}")
                    self.before.pop(other.name, None)
                    break

    def _integers_alone(self) -> None:
        """Integers whose scales nobody knows: those of the rows of which they are the rounding."""
        for before, after in product([*self.before.values()], [*self.after.values()]):
            if after.scaled or before.flat != after.flat or before.name not in self.before:
                continue
            # Formats don't agree on which half of a byte comes first.
            for read in (after, after.halves_exchanged()) if after.bits < 8 else (after,):
                if after.name in self.after and rows_alike(before, read) > _ROW_ALIKE:
                    self._take(Pair(before, read, "content"))

    def _own_of_graphs(self) -> None:
        """Frequencies of rotary positions, which weights lack; and the few numbers that a program holds itself."""
        for name, after in list(self.after.items()):
            values = self._profile(after).rows if len(after.shape) == 1 else np.empty(0)
            if len(values) > 1 and values[0] == 1 and (np.diff(values) < 0).all() and values[-1] > 0:
                self.folded.append(f"{name} are frequencies of rotary positions, which the first computes")
                del self.after[name]
        for name, before in list(self.before.items()):
            if math.prod(before.shape) < FEWEST:
                self.folded.append(
                    f"{name}, {math.prod(before.shape)} numbers, was not found among the second's tensors"
                )
                del self.before[name]

    def _constants(self) -> None:
        """Vectors of one number: a graph keeps equal ones once, and none at all where it is 0 or 1."""
        for side in (self.before, self.after):
            for name, weight in list(side.items()):
                mine = self._profile(weight)
                if mine.columns is None and mine.constant:
                    self.folded.append(f"{name} is {mine.rows[0]:g} everywhere, which the other needn't store")
                    del side[name]

    def _profile(self, weight: Weight) -> Profile:
        if weight not in self._profiles:
            self._profiles[weight] = Profile.of(weight)
        return self._profiles[weight]

    def _common_names(self) -> dict[str, str]:
        """Names of both that are one but for what a wrapper puts before them."""
        prefixes = model_prefix(self.before), model_prefix(self.after)
        bare = {name.removeprefix(prefixes[1]): name for name in self.after}
        return {name: bare[short] for name in self.before if (short := name.removeprefix(prefixes[0])) in bare}

    def _take(self, pair: Pair) -> None:
        self.pairs.append(pair)
        self.before.pop(pair.before.name, None)
        if pair.count is None:
            self.after.pop(pair.after.name, None)

    def _by_name_alone(self, old: str, new: str) -> None:
        before, after = self.before[old], self.after[new]
        if math.prod(before.shape) != math.prod(after.shape):
            self.resized.append((self.before.pop(old), self.after.pop(new)))
            return
        turned = before.shape != after.shape and before.flat == after.flat[::-1]
        if before.shape == after.shape or turned:
            self._take(Pair(before, after, "name", turned=turned))
        else:
            self.resized.append((self.before.pop(old), self.after.pop(new)))

    def _by_content(self, names: Mapping[str, str]) -> None:
        """The likeliest pairs first; what stands side by side in one tensor is found there by parts."""
        if not self.before or not self.after:
            return
        options = sorted(self._options(names), key=lambda one: -one[0])
        taken: dict[str, list[tuple[int, int]]] = {}
        for _, pair in options:
            count = pair.before.flat[0] if len(pair.before.shape) > 1 else pair.before.flat[1]
            span = (pair.start, pair.start + count)
            used = taken.setdefault(pair.after.name, [])
            if pair.before.name in self.before and all(span[1] <= low or span[0] >= high for low, high in used):
                used.append(span)
                self.pairs.append(pair)
                del self.before[pair.before.name]
        for name, spans in taken.items():
            if spans:
                self.after.pop(name, None)

    def _options(self, names: Mapping[str, str]) -> Iterator[tuple[float, Pair]]:
        places = [{name: place / len(side) for place, name in enumerate(side)} for side in (self.before, self.after)]
        for before in self.before.values():
            mine = self._profile(before)
            for after in self.after.values():
                called = names.get(before.name) == after.name
                for score, pair in likely(before, mine, after, self._profile(after)):
                    if called and pair.count is not None:
                        continue  # a part of its namesake was cut off
                    # Of equally likely ones, the namesake; then what lies at the same place of the file.
                    apart = abs(places[0][before.name] - places[1][after.name])
                    yield score + 0.01 * called - 1e-3 * apart, pair

    def _again(self) -> Iterator[Pair]:
        """What is left of the second model, and stands in the first under a name that is matched already."""
        known = [pair.before for pair in self.pairs]
        for after in self.after.values():
            if not math.prod(after.shape) > FEWEST:
                continue
            found = [
                one
                for before in known
                if math.prod(before.shape) == math.prod(after.shape)
                for one in likely(before, self._profile(before), after, self._profile(after))
            ]
            if found:
                yield max(found, key=lambda one: one[0])[1]
