"""The tensors of two models, pair by pair: how far each moved, what of that is rounding, and what was done to it."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from compress.inspection.layers import model_prefix
from compress.inspection.tensors import ModelContents, read_model
from compress.numerics.weight_difference import Chunk, DifferenceSums, ratio, reordered, repeated_within, spectrum, sums
from compress.plugins.diff.dequantize import CHUNK, Weight, side_by_side, weights_of
from compress.plugins.diff.diagnose import causes_of
from compress.plugins.diff.matching import match
from compress.plugins.diff.pairs import Pair, aligned
from compress.plugins.diff.record import How, LayerChange, TensorChange, WeightsDiff
from compress.utils.progress import Progress

_TIMES_ROUNDING = 2.0
"""How many times what rounding to the nearest step gives a tensor may be off: ranges are clipped, and errors made up
for elsewhere."""
_FACTOR = 0.005
"""From here on a factor is more than rounding does."""
_SUM_ORDER = 1e-6
"""Of floats of one kind: the last bit, as a product of constants computed beforehand leaves it."""
_SCALE_NEAR = 0.003
"""How far a rounded tensor's factor may be from attention's scale."""
_TURNED = 0.95
"""Cosine below which another order of the rows is looked for."""
_BLOCK = re.compile(r"^(?P<block>(?:[^.\d][^.]*\.)+\d+)\.(?P<rest>.+)$")
_HEAD = 4


def compare_weights(before: Path, after: Path, progress: Progress) -> WeightsDiff:
    """Tensor by tensor; no more than a few of them are in memory at once. Raises `ModelError`."""
    sides = read_model(before), read_model(after)
    (old, unread_old), (new, unread_new) = (
        weights_of(contents, place if place.is_dir() else place.parent)
        for contents, place in zip(sides, (before, after), strict=True)
    )
    progress.note("finding out which tensor is which")
    found = match(old, new, same_layout=sides[0].format == sides[1].format)
    layers = kinds_of([pair.before.name for pair in found.pairs])
    tensors = []
    for pair in progress.track(found.pairs, "compare weights", len(found.pairs)):
        tensors.append(_Reading(pair, sides, found.turned).change(*layers[pair.before.name]))
    order = {name: place for place, name in enumerate(new if found.turned else old)}
    tensors.sort(key=lambda one: order.get(one.name.partition("[")[0], 0))
    return WeightsDiff(
        formats=(sides[0].format, sides[1].format),
        tensors=tuple(tensors),
        layers=layers_changed(tensors),
        added=tuple(one.name for one in found.added),
        removed=tuple(one.name for one in found.removed),
        resized=tuple(f"{old.name}: {list(old.shape)} \u2192 {list(new.shape)}" for old, new in found.resized),
        again=(*found.folded, *(f"{one.after.name} is {one.before.name} once more" for one in found.extra)),
        unread=tuple(dict.fromkeys((*unread_old, *unread_new))),
    )


def kinds_of(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Tensor's name -> its layer and which part of the layer it is, weight and bias together."""
    prefix = model_prefix(names)
    found = {}
    for name in names:
        module = name.removeprefix(prefix).rpartition(".")[0] or name
        match = _BLOCK.match(module)
        found[name] = (match["block"], match["rest"]) if match else (module, "whole")
    return found


@dataclass
class _Reading:
    """A pair of tensors, read as often as it has to be; with ``turned`` its first is of the second model."""

    pair: Pair
    sides: tuple[ModelContents, ModelContents]
    turned: bool

    def __post_init__(self) -> None:
        self._whole: tuple[np.ndarray, np.ndarray, np.ndarray | None] | None = None
        self._scale = np.float32(1)
        self._order: np.ndarray | None = None
        self.streams = self.pair.whole and self.pair.before.plain is not None and self.pair.after.plain is not None

    def chunks(self) -> Iterator[Chunk]:
        """Rows of both, stretch by stretch; nothing but those is in memory where files hold plain arrays."""
        for one, other in side_by_side(self.pair.before, self.pair.after) if self.streams else self._stretches():
            scaled = one if self._scale == 1 else one * self._scale
            yield (other, scaled) if self.turned else (scaled, other)

    def _stretches(self) -> Iterator[Chunk]:
        before, after, _ = self.whole
        step = max(1, CHUNK // before.shape[1])
        for start in range(0, len(before), step):
            yield before[start : start + step], after[start : start + step]

    @property
    def whole(self) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Both as matrices of one layout, and the step of the second's grid."""
        if self._whole is None:
            before, after, steps = aligned(self.pair)
            before = before if self._order is None else before[self._order]
            if not self.pair.after.scaled:
                after, steps = _fitted(before, after)
            self._whole = before, after, steps
        return self._whole

    @property
    def _sides(self) -> tuple[Weight, Weight]:
        """The first model's tensor, and the second's."""
        pair = self.pair
        return (pair.after, pair.before) if self.turned else (pair.before, pair.after)

    def change(self, layer: str, kind: str) -> TensorChange:
        """What is found of the pair."""
        read = sums(self.chunks)
        folded = self._attention_scale(read) or self._rotary_order(read)
        read = sums(self.chunks) if folded else read
        rounding, within = self._rounding(read)
        relative, scaled = read.relative, read.product / read.before if read.before else 1.0
        times = ratio(read.difference, rounding) if rounding else None
        how, unexplained = self._judged(read, rounding)
        one, other = self._sides
        name, shape, flat = self.pair.before.name, self.pair.before.shape, self.pair.before.flat
        matrix = min(flat) > 1
        causes = folded if how != "changed" else ()
        if one.bits != other.bits and self.sides[0].format == self.sides[1].format:
            causes = (*causes, f"{other.bits:.3g} bits a weight where there were {one.bits:.3g}")
        told = how == "changed" and matrix and not any(read.not_finite)
        head = spectrum(self.chunks, flat[1], read.difference) if told else None
        return TensorChange(
            name=name,
            other="" if one.name == other.name else self.pair.after.name,
            layer=layer,
            kind=kind,
            shape=shape,
            how=how,
            by=self.pair.by,
            relative=_finite(relative),
            unexplained=_finite(unexplained),
            times_rounding=None if times is None else _finite(times),
            within_half_step=within,
            cosine=read.cosine,
            factor=scaled,
            ranges=(read.low[0], read.high[0], read.low[1], read.high[1]),
            sparsity=(read.zeros[0] / read.size, read.zeros[1] / read.size),
            bits=(one.bits, other.bits),
            dtypes=(one.dtype, other.dtype),
            zeroed_rows=tuple(np.flatnonzero((read.rows.before > 0) & (read.rows.after == 0)).tolist()),
            spectrum=None if head is None else (head.before[:_HEAD], head.after[:_HEAD]),
            rank=None if head is None else head.rank,
            causes=causes if how != "changed" else (*causes_of(read, head, self.chunks, flat), *causes),
        )

    def _attention_scale(self, read: DifferenceSums) -> tuple[str, ...]:
        """Take out the scale of attention, size^(-1/2), or its square root of both factors, where a graph has it."""
        if self.sides[0].format == self.sides[1].format or not read.before or read.cosine < _TURNED:
            return ()
        factor = read.product / (read.after if self.turned else read.before)
        for power in (2, -2, 4, -4):
            size = factor**-power
            if size > 3 and abs(size - round(size)) < min(0.3, _SCALE_NEAR * abs(power) * size):
                self._scale = np.float32(round(size) ** (-1 / power))
                return (f"times {self._scale:.4g}, attention's scale of heads of {round(size)}",)
        return ()

    def _rotary_order(self, read: DifferenceSums) -> tuple[str, ...]:
        """Take the rows in the other's order where that is the same in each head, as formats keep rotary halves."""
        one = self.pair.before
        if self.sides[0].format == self.sides[1].format or min(one.flat) < 2 or read.cosine > _TURNED:
            return ()
        found = reordered(self.chunks, one.flat, along_rows=True)
        size = None if found is None else repeated_within(np.array(found.order))
        if found is None or size is None:
            return ()
        self.streams, self._whole, self._order = False, None, np.array(found.order)
        return (f"the rows of each {size} stand in another order, as the format keeps them",)

    def _rounding(self, read: DifferenceSums) -> tuple[float, float | None]:
        """Sum of squares that the steps of both grids explain, and the share of weights within half a step.

        Rounding to a step s is off by s / sqrt(12) (Bennett 1948). Floats of one kind on both sides aren't rounded.
        """
        one, other = self._sides
        explained = 0.0
        if one.dtype != other.dtype:
            for side, squares in ((one, read.before), (other, read.after)):
                # A float's step is between epsilon / 2 and epsilon of it.
                explained += side.epsilon**2 * squares / 24
        if self.streams:
            return explained, None
        _, _, steps = self.whole
        within = None
        if self.pair.before.plain is None and (own := self.pair.before.read()[1]) is not None:
            explained += float(np.square(own, dtype=np.float64).sum()) / 12
        if steps is not None:
            explained += float(np.square(steps, dtype=np.float64).sum()) / 12
            before, after, _ = self.whole
            before = before * self._scale
            near = np.abs(after - before) <= 0.5 * steps * 1.001 + 1e-6 * np.abs(before)
            within = float(near.mean())
        return explained, within

    def _judged(self, read: DifferenceSums, rounding: float) -> tuple[How, float]:
        """Of which kind the change is, and its size without what rounding explains."""
        if read.difference == 0 and read.not_finite[0] == read.not_finite[1]:
            return "identical", 0.0
        if read.not_finite[1] != read.not_finite[0]:
            return "changed", float("inf")
        if rounding == 0 or self.pair.before.dtype == self.pair.after.dtype == "float32":
            return ("rounded", 0.0) if read.relative <= _SUM_ORDER else ("changed", read.relative)
        left = ratio(max(read.difference - rounding, 0.0), read.before)
        if read.difference > _TIMES_ROUNDING**2 * rounding:
            return "changed", left
        factor = self._factor(read)
        return ("changed", abs(factor - 1)) if abs(factor - 1) > _FACTOR else ("rounded", 0.0)

    @staticmethod
    def _factor(read: DifferenceSums) -> float:
        """How many times the first the second is, as far as both ways to fit it agree; else 1.

        Rounding alone draws the one below 1 and the other above, or leaves them there.
        """
        if not read.before or not read.product:
            return 1.0
        fits = read.product / read.before, read.after / read.product
        if min(fits) <= 1 <= max(fits):
            return 1.0
        return min(fits, key=lambda fit: abs(fit - 1))


def _fitted(before: np.ndarray, integers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Integers times the scale of each row, which lies elsewhere: by least squares, with the zero point."""
    mean, middle = before.mean(axis=1, keepdims=True), integers.mean(axis=1, keepdims=True)
    spread = np.square(integers - middle).sum(axis=1, keepdims=True)
    products = ((before - mean) * (integers - middle)).sum(axis=1, keepdims=True)
    scale = np.divide(products, spread, out=np.zeros_like(products), where=spread > 0)
    return mean + scale * (integers - middle), np.broadcast_to(np.abs(scale), before.shape)


def _finite(value: float) -> float:
    """JSON has no infinity: what grows from nothing is told as a great deal."""
    return value if np.isfinite(value) else 1e9


def layers_changed(tensors: Iterable[TensorChange]) -> tuple[LayerChange, ...]:
    """Layers with a tensor that isn't identical: by what isn't explained, then by all of the change."""
    by_layer: dict[str, list[TensorChange]] = defaultdict(list)
    for tensor in tensors:
        by_layer[tensor.layer].append(tensor)
    found = [
        _layer(name, members) for name, members in by_layer.items() if any(one.how != "identical" for one in members)
    ]
    return tuple(sorted(found, key=lambda one: (-one.unexplained, -one.relative)))


def _layer(name: str, members: Sequence[TensorChange]) -> LayerChange:
    """Each tensor's change is a share of its own size, and counts by its number of weights."""
    worst = max(members, key=lambda one: (one.unexplained, one.relative))
    whole = sum(one.entries for one in members)
    squares = sum(one.entries * min(one.relative, 1e3) ** 2 for one in members)
    left = sum(one.entries * min(one.unexplained, 1e3) ** 2 for one in members)
    return LayerChange(
        name=name,
        relative=float(np.sqrt(squares / whole)),
        unexplained=float(np.sqrt(left / whole)),
        changed=sum(one.how == "changed" for one in members),
        tensors=len(members),
        worst=worst.name,
        causes=tuple(dict.fromkeys(cause for one in members for cause in one.causes)),
    )
