"""Matching of the tensors of two models by name, and by content if names do not identify them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import product

import numpy as np

from compress.inspection.layers import model_prefix
from compress.plugins.diff.dequantize import Pair, Weight, row_slice

_ALIKE = 0.8
"""Smallest correlation of two fingerprints that may belong to one tensor."""
_SURE = 0.97
"""Smallest correlation of rows or of columns alone that identifies a tensor if the other axis is permuted."""
FEWEST = 8
"""Smallest number of values that identifies a tensor."""


@dataclass(frozen=True)
class TensorFingerprint:
    """Fingerprint of a tensor: norms of its ``rows`` and along its last axis, or the values of a vector."""

    rows: np.ndarray
    columns: np.ndarray | None
    constant: bool

    @classmethod
    def of(cls, weight: Weight) -> TensorFingerprint:
        """Compute the fingerprint by reading the whole tensor in chunks of rows."""
        shape = weight.shape
        # A vector has no norms to compare. Its values are the fingerprint.
        if sum(size > 1 for size in shape) < 2:
            values = np.concatenate([part.ravel() for part in weight.chunks()])
            return cls(values, None, bool(values.size == 0 or np.ptp(values) == 0))
        if len(shape) > 2:
            whole = np.concatenate(list(weight.chunks())).reshape(shape)
            others = tuple(range(1, len(shape)))
            rows, columns = np.square(whole).sum(axis=others), np.square(whole).sum(axis=tuple(range(len(shape) - 1)))
        else:
            parts = [np.square(part) for part in weight.chunks()]
            rows = np.concatenate([part.sum(axis=1) for part in parts])
            columns = sum(part.sum(axis=0) for part in parts)
        return cls(np.sqrt(rows), np.sqrt(columns), bool(not np.any(rows)))


def candidate_pairs(
    before: Weight, mine: TensorFingerprint, after: Weight, theirs: TensorFingerprint
) -> Iterator[tuple[float, Pair]]:
    """Yield (score, pair) for each layout in which ``before`` may be ``after`` or a slice of it.

    Args:
        before: Tensor of the first model.
        mine: Fingerprint of ``before``.
        after: Tensor of the second model.
        theirs: Fingerprint of ``after``.
    """
    count = len(mine.rows)
    if mine.columns is None or theirs.columns is None:
        if mine.columns is theirs.columns and count <= len(theirs.rows):
            yield from _vector_pairs(before, mine, after, theirs)
        return
    # Try the stored layout first, then the transposed one.
    layouts = ((theirs.rows, theirs.columns, False), (theirs.columns, theirs.rows, True))
    for rows, columns, turned in layouts:
        if turned and len(after.shape) > 2 and math.prod(after.shape) != math.prod(before.shape):
            continue
        row_length = math.prod(after.shape) // max(len(rows), 1)
        if row_length != before.flat[1] or len(rows) < count:
            continue
        column_score = correlation(mine.columns, columns) if len(columns) == len(mine.columns) else 0.0
        if len(rows) == count:
            row_score = correlation(mine.rows, rows)
            scores = [score for score, side in ((column_score, columns), (row_score, rows)) if len(side) >= FEWEST]
            if scores and (min(scores) >= _ALIKE or max(scores) >= _SURE):
                yield sum(scores) / len(scores), Pair(before, after, "content", turned)
        # A shorter tensor may be a slice of a concatenation, such as the query part of a fused projection.
        elif count >= FEWEST:
            start, row_score = _best_offset(mine.rows, rows)
            if row_score >= _SURE:
                yield row_score, Pair(before, after, "content", turned, start, count)


def _vector_pairs(
    before: Weight, mine: TensorFingerprint, after: Weight, theirs: TensorFingerprint
) -> Iterator[tuple[float, Pair]]:
    """Yield (score, pair) if a vector is similar to another or to a slice of it."""
    count = len(mine.rows)
    if mine.constant:
        if theirs.constant and len(theirs.rows) == count and np.array_equal(mine.rows[:1], theirs.rows[:1]):
            yield 0.5, Pair(before, after, "content")
        return
    if count < 2:
        return
    start, along = _best_offset(mine.rows, theirs.rows)
    close = np.linalg.norm(theirs.rows[start : start + count] - mine.rows) <= 0.2 * np.linalg.norm(mine.rows)
    if along >= _SURE and (close or count >= FEWEST):
        yield along, Pair(before, after, "content", False, start, None if count == len(theirs.rows) else count)


def _best_offset(mine: np.ndarray, theirs: np.ndarray) -> tuple[int, float]:
    """Return the offset in ``theirs`` of the slice that is most similar to ``mine``, and their correlation."""
    starts = range(0, len(theirs) - len(mine) + 1, math.gcd(len(mine), len(theirs)))
    scores = [correlation(mine, theirs[start : start + len(mine)]) for start in starts]
    best = int(np.argmax(scores))
    return starts[best], scores[best]


def correlation(left: np.ndarray, right: np.ndarray) -> float:
    """Return Pearson's correlation, or 0 if either is constant.

    Fewer than 3 values have no meaningful correlation. They give 1 if they are nearly equal, else 0.
    """
    if len(left) < 3:
        return float(np.allclose(left, right, rtol=0.05, atol=1e-6))
    left_centred, right_centred = left - left.mean(), right - right.mean()
    norms = np.linalg.norm(left_centred) * np.linalg.norm(right_centred)
    varies = norms > 1e-12 * np.linalg.norm(left) * np.linalg.norm(right)
    return float(left_centred @ right_centred / norms) if varies else 0.0


def _row_correlation(before: Weight, after: Weight) -> float:
    """Return the median correlation of corresponding rows."""
    old, new = (np.concatenate(list(array.chunks())) for array in (before, after))
    old, new = (array - array.mean(axis=1, keepdims=True) for array in (old, new))
    norms = np.linalg.norm(old, axis=1) * np.linalg.norm(new, axis=1)
    return float(np.median(np.divide((old * new).sum(axis=1), norms, out=np.zeros_like(norms), where=norms > 0)))


_ROW_ALIKE = 0.9
"""Smallest median correlation of rows that identifies integers as the rounding of floats."""


@dataclass(frozen=True)
class Matches:
    """Pairs of tensors of two models, and tensors without a counterpart.

    ``resized`` have one name and different shapes. ``extra`` are copies in the second model. ``folded`` describes
    tensors that a graph does not need to store. ``swapped`` is True if the pairs start from the second model.
    """

    pairs: tuple[Pair, ...]
    removed: tuple[Weight, ...]
    added: tuple[Weight, ...]
    resized: tuple[tuple[Weight, Weight], ...]
    extra: tuple[Pair, ...] = ()
    folded: tuple[str, ...] = ()
    swapped: bool = False

    @property
    def unmatched_count(self) -> int:
        """Number of tensors without a counterpart."""
        return len(self.removed) + len(self.added) + len(self.resized)


def match_tensors(before: Mapping[str, Weight], after: Mapping[str, Weight], same_layout: bool) -> Matches:
    """Pair the tensors of two models.

    Args:
        before: Weights of the first model by name.
        after: Weights of the second model by name.
        same_layout: True if a common name and shape identify a tensor.

    Returns:
        The matches. Between formats, the direction that leaves fewer tensors without a counterpart is used, because
        either model may store the other's tensors concatenated or added up.
    """
    matches = _Matching(dict(before), dict(after), same_layout).run()
    if same_layout or not matches.unmatched_count:
        return matches
    reverse = _Matching(dict(after), dict(before), same_layout).run()
    if reverse.unmatched_count >= matches.unmatched_count:
        return matches
    resized = tuple((first, second) for second, first in reverse.resized)
    return replace(reverse, added=reverse.removed, removed=reverse.added, resized=resized, swapped=True)


@dataclass
class _Matching:
    """State of one matching: the tensors that have no counterpart yet, and the pairs."""

    before: dict[str, Weight]
    after: dict[str, Weight]
    same_layout: bool
    pairs: list[Pair] = field(default_factory=list)
    resized: list[tuple[Weight, Weight]] = field(default_factory=list)
    folded: list[str] = field(default_factory=list)
    _fingerprints: dict[Weight, TensorFingerprint] = field(default_factory=dict)

    def run(self) -> Matches:
        """Return the matches, from the most certain rule to the least."""
        # The names of the second model by the equal names of the first, without the prefixes of wrappers.
        prefixes = model_prefix(self.before), model_prefix(self.after)
        bare = {name.removeprefix(prefixes[1]): name for name in self.after}
        names = {name: bare[short] for name in self.before if (short := name.removeprefix(prefixes[0])) in bare}
        if self.same_layout:
            for old, new in names.items():
                first, second = self.before[old], self.after[new]
                # Formats may store quantized weights transposed, so that types must agree too.
                if first.shape == second.shape and first.dtype == second.dtype:
                    self._add_pair(Pair(first, second, "name"))
        # Content first: exporters keep names for tensors that they changed.
        self._match_content(names)
        self._match_concatenated(names)
        # Two tensors of one name may be transposed. Other shapes count as resized.
        for old, new in names.items():
            if old in self.before and new in self.after:
                first, second = self.before[old], self.after[new]
                if first.shape == second.shape or first.flat == second.flat[::-1]:
                    self._add_pair(Pair(first, second, "name", turned=first.shape != second.shape))
                else:
                    self.resized.append((self.before.pop(old), self.after.pop(new)))
        if not self.same_layout:
            self._match_added_rows()
            # Match parts of concatenated tensors that the first model stores transposed.
            originals = dict(self.before)
            self.before = {name: weight.transposed() for name, weight in originals.items()}
            self._match_content(names)
            self._match_concatenated(names)
            self.before = {name: originals[name] for name in self.before}
            self._match_unscaled_integers()
            self._describe_derived()
        extra = tuple(self._extra_copies())
        duplicates = {pair.after.name for pair in extra}
        added = tuple(weight for name, weight in self.after.items() if name not in duplicates)
        removed = tuple(self.before.values())
        return Matches(tuple(self.pairs), removed, added, tuple(self.resized), extra, tuple(self.folded))

    def _match_concatenated(self, names: Mapping[str, str]) -> None:
        """Match tensors of the second model that are concatenated in one of the first."""
        # Exchange the roles, so that each part is looked for in the concatenation.
        reverse = _Matching(dict(self.after), dict(self.before), False)
        reverse._match_content({})
        spans: dict[str, int] = defaultdict(int)
        for pair in reverse.pairs:
            if pair.count is not None and names.get(pair.after.name) != pair.before.name:
                whole, part = pair.after, pair.before
                spans[whole.name] += pair.count
                self.pairs.append(Pair(row_slice(pair), part, "content"))
                del self.after[part.name]
        # A concatenation is matched once its parts cover an axis.
        for name, count in spans.items():
            if count in self.before[name].shape:
                del self.before[name]

    def _match_added_rows(self) -> None:
        """Match tables to whose rows one row of another table was added, such as a single token type embedding."""
        tables = [table for table in self.before.values() if len(table.shape) == 2]
        for before, after in product(tables, [*self.after.values()]):
            if before.shape != after.shape or before.name not in self.before or after.name not in self.after:
                continue
            old, new = (np.concatenate(list(table.chunks())) for table in (before, after))
            # All rows moved by the same offset if the rest is small.
            offset = (new - old).mean(axis=0)
            if np.linalg.norm(new - old - offset) > 0.05 * np.linalg.norm(old):
                continue
            for other in [table for table in tables if table is not before and table.shape[1] == len(offset)]:
                distances = np.linalg.norm(np.concatenate(list(other.chunks())) - offset, axis=1)
                # The offset is a row of another table, which the exporter folded into this one.
                if distances.min() <= 0.05 * np.linalg.norm(offset):
                    self._add_pair(
                        Pair(before, after, "content", plus=np.concatenate(list(other.chunks()))[distances.argmin()])
                    )
                    self.folded.append(f"row {distances.argmin()} of {other.name} is added to {before.name}")
                    self.before.pop(other.name, None)
                    break

    def _match_unscaled_integers(self) -> None:
        """Match integers with unknown scales to floats by the correlation of their rows."""
        for before, after in product([*self.before.values()], [*self.after.values()]):
            if after.scaled or before.flat != after.flat or before.name not in self.before:
                continue
            # Formats differ in the half of a byte that comes first.
            for read in (after, after.halves_exchanged()) if after.bits < 8 else (after,):
                if after.name in self.after and _row_correlation(before, read) > _ROW_ALIKE:
                    self._add_pair(Pair(before, read, "content"))

    def _describe_derived(self) -> None:
        """Describe tensors that a model need not store: constant vectors, rotary frequencies and tiny tensors."""
        # A graph stores equal constant vectors once, and omits zeros and ones.
        for side in (self.before, self.after):
            for name, weight in list(side.items()):
                fingerprint = self._fingerprint(weight)
                if fingerprint.columns is None and fingerprint.constant:
                    self.folded.append(f"{name} is {fingerprint.rows[0]:g} everywhere, which the other needn't store")
                    del side[name]
        # Checkpoints do not store rotary frequencies, and programs inline tiny tensors.
        for name, after in list(self.after.items()):
            values = self._fingerprint(after).rows if len(after.shape) == 1 else np.empty(0)
            if len(values) > 1 and values[0] == 1 and (np.diff(values) < 0).all() and values[-1] > 0:
                self.folded.append(f"{name} are frequencies of rotary positions, which the first computes")
                del self.after[name]
        for name, before in list(self.before.items()):
            if (count := math.prod(before.shape)) < FEWEST:
                self.folded.append(f"{name}, {count} numbers, was not found among the second's tensors")
                del self.before[name]

    def _fingerprint(self, weight: Weight) -> TensorFingerprint:
        if weight not in self._fingerprints:
            self._fingerprints[weight] = TensorFingerprint.of(weight)
        return self._fingerprints[weight]

    def _add_pair(self, pair: Pair) -> None:
        self.pairs.append(pair)
        self.before.pop(pair.before.name, None)
        if pair.count is None:
            self.after.pop(pair.after.name, None)

    def _match_content(self, names: Mapping[str, str]) -> None:
        """Match the most similar pairs first. Parts of a concatenated tensor must not overlap."""
        if not self.before or not self.after:
            return
        options = sorted(self._candidates(names), key=lambda option: -option[0])
        spans_by_name: dict[str, list[tuple[int, int]]] = {}
        for _, pair in options:
            count = pair.before.flat[0] if len(pair.before.shape) > 1 else pair.before.flat[1]
            span = (pair.start, pair.start + count)
            used = spans_by_name.setdefault(pair.after.name, [])
            if pair.before.name in self.before and all(span[1] <= low or span[0] >= high for low, high in used):
                used.append(span)
                self.pairs.append(pair)
                del self.before[pair.before.name]
        for name, spans in spans_by_name.items():
            if spans:
                self.after.pop(name, None)

    def _candidates(self, names: Mapping[str, str]) -> Iterator[tuple[float, Pair]]:
        positions = [{name: index / len(side) for index, name in enumerate(side)} for side in (self.before, self.after)]
        for before in self.before.values():
            fingerprint = self._fingerprint(before)
            for after in self.after.values():
                same_name = names.get(before.name) == after.name
                for score, pair in candidate_pairs(before, fingerprint, after, self._fingerprint(after)):
                    if same_name and pair.count is not None:
                        continue  # The tensor was enlarged, and is not a part of itself.
                    # Prefer the same name among equal scores, then the same relative position in the file.
                    distance = abs(positions[0][before.name] - positions[1][after.name])
                    yield score + 0.01 * same_name - 1e-3 * distance, pair

    def _extra_copies(self) -> Iterator[Pair]:
        """Yield further copies in the second model of tensors that are matched already."""
        matched = [pair.before for pair in self.pairs]
        for after in self.after.values():
            if not math.prod(after.shape) > FEWEST:
                continue
            candidates = [
                candidate
                for before in matched
                if math.prod(before.shape) == math.prod(after.shape)
                for candidate in candidate_pairs(before, self._fingerprint(before), after, self._fingerprint(after))
            ]
            if candidates:
                yield max(candidates, key=lambda candidate: candidate[0])[1]
