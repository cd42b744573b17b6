"""Comparison of weights: the size of each tensor's change, the part that rounding explains, and the likely cause."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from compress.inspection.layers import model_prefix
from compress.inspection.tensors import ModelContents, read_model
from compress.plugins.diff.dequantize import CHUNK, Pair, Weight, aligned_matrices, paired_chunks, read_weights
from compress.plugins.diff.diagnose import find_causes
from compress.plugins.diff.matching import match_tensors
from compress.plugins.diff.record import How, LayerChange, TensorChange, WeightsDiff
from compress.plugins.diff.weight_difference import (
    Chunk,
    DifferenceSums,
    ratio,
    reordered,
    repeated_within,
    spectrum,
    sums,
)
from compress.utils.progress import Progress

_TIMES_ROUNDING = 2.0
"""Allowed ratio of a quantization error to round-to-nearest.

Clipping and error compensation exceed round-to-nearest.
"""
_FACTOR = 0.005
"""Smallest deviation of a tensor's factor from 1 that rounding does not explain."""
_SUM_ORDER = 1e-6
"""Largest relative error of precomputed float32 products, which differ in the last bit."""
_SCALE_NEAR = 0.003
"""Largest relative distance of a tensor's factor from an attention scale."""
_TURNED = 0.95
"""Cosine below which a permutation of the rows is looked for."""
_BLOCK = re.compile(r"^(?P<block>(?:[^.\d][^.]*\.)+\d+)\.(?P<rest>.+)$")
_HEAD = 4


def compare_weights(before: Path, after: Path, progress: Progress) -> WeightsDiff:
    """Compare two models tensor by tensor. Only a few tensors are in memory at a time.

    Raises:
        ModelError: A model's weights cannot be read.
    """
    sides = read_model(before), read_model(after)
    (old, unread_old), (new, unread_new) = (
        read_weights(contents, path if path.is_dir() else path.parent)
        for contents, path in zip(sides, (before, after), strict=True)
    )
    progress.note("matching tensors")
    # Names identify tensors only within one format.
    matches = match_tensors(old, new, same_layout=sides[0].format == sides[1].format)
    prefix, tensors = model_prefix([pair.before.name for pair in matches.pairs]), []
    for pair in progress.track(matches.pairs, "compare weights", len(matches.pairs)):
        module = pair.before.name.removeprefix(prefix).rpartition(".")[0] or pair.before.name
        # A numbered block is a layer. Weight and bias of a module have the same kind.
        block = _BLOCK.match(module)
        layer, kind = (block["block"], block["rest"]) if block else (module, "whole")
        tensors.append(_PairReader(pair, sides, matches.swapped).change(layer, kind))
    # Pairs were matched by certainty. Show them in the order of the first model.
    order = {name: index for index, name in enumerate(new if matches.swapped else old)}
    tensors.sort(key=lambda tensor: order.get(tensor.name.partition("[")[0], 0))
    return WeightsDiff(
        formats=(sides[0].format, sides[1].format),
        tensors=tuple(tensors),
        layers=layers_changed(tensors),
        added=tuple(tensor.name for tensor in matches.added),
        removed=tuple(tensor.name for tensor in matches.removed),
        resized=tuple(f"{old.name}: {list(old.shape)} \u2192 {list(new.shape)}" for old, new in matches.resized),
        again=(*matches.folded, *(f"{pair.after.name} is {pair.before.name} once more" for pair in matches.extra)),
        unread=tuple(dict.fromkeys((*unread_old, *unread_new))),
    )


@dataclass
class _PairReader:
    """Pair of tensors that is read in several passes. With ``swapped`` its first tensor belongs to the second model."""

    pair: Pair
    sides: tuple[ModelContents, ModelContents]
    swapped: bool

    def __post_init__(self) -> None:
        self._whole: tuple[np.ndarray, np.ndarray, np.ndarray | None] | None = None
        self._scale = np.float32(1)
        self._order: np.ndarray | None = None
        self.streams = self.pair.whole and self.pair.before.plain is not None and self.pair.after.plain is not None

    def chunks(self) -> Iterator[Chunk]:
        """Yield chunks of rows of both tensors. Plain arrays are streamed from the files."""
        if self.streams:
            pairs = paired_chunks(self.pair.before, self.pair.after)
        else:
            before, after, _ = self.whole
            step = max(1, CHUNK // before.shape[1])
            pairs = ((before[row : row + step], after[row : row + step]) for row in range(0, len(before), step))
        for left, right in pairs:
            scaled = left if self._scale == 1 else left * self._scale
            yield (right, scaled) if self.swapped else (scaled, right)

    @property
    def whole(self) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Both tensors as matrices of one layout, and the quantization step of each value of the second."""
        if self._whole is None:
            before, after, steps = aligned_matrices(self.pair)
            before = before if self._order is None else before[self._order]
            if not self.pair.after.scaled:
                # Fit scale and zero point of each row of integers to the float rows by least squares.
                mean, integer_mean = before.mean(axis=1, keepdims=True), after.mean(axis=1, keepdims=True)
                spread = np.square(after - integer_mean).sum(axis=1, keepdims=True)
                products = ((before - mean) * (after - integer_mean)).sum(axis=1, keepdims=True)
                scale = np.divide(products, spread, out=np.zeros_like(products), where=spread > 0)
                after, steps = (mean + scale * (after - integer_mean), np.broadcast_to(np.abs(scale), before.shape))
            self._whole = before, after, steps
        return self._whole

    @property
    def _sides(self) -> tuple[Weight, Weight]:
        """Tensors of the first and the second model."""
        pair = self.pair
        return (pair.after, pair.before) if self.swapped else (pair.before, pair.after)

    def change(self, layer: str, kind: str) -> TensorChange:
        """Measure the change of the pair and look for its causes."""
        read = sums(self.chunks)
        # A graph may fold the attention scale into weights, or permute rows for rotary embeddings. Undo this first.
        folded = self._undo_attention_scale(read) or self._undo_rotary_order(read)
        read = sums(self.chunks) if folded else read
        rounding, within = self._rounding(read)
        how, unexplained = self._classify(read, rounding)
        (old, new), before, flat = self._sides, self.pair.before, self.pair.before.flat
        causes = folded if how != "changed" else ()
        if old.bits != new.bits and self.sides[0].format == self.sides[1].format:
            causes = (*causes, f"{new.bits:.3g} bits a weight where there were {old.bits:.3g}")
        values = None
        if how == "changed":
            # The singular values are expensive and only useful for matrices that changed.
            if min(flat) > 1 and not any(read.not_finite):
                values = spectrum(self.chunks, flat[1], read.difference)
            causes = (*find_causes(read, values, self.chunks, flat), *causes)
        return TensorChange(
            name=before.name,
            other="" if old.name == new.name else self.pair.after.name,
            layer=layer,
            kind=kind,
            shape=before.shape,
            how=how,
            by=self.pair.by,
            relative=_finite(read.relative),
            unexplained=_finite(unexplained),
            squares=(read.before, read.difference),
            times_rounding=_finite(ratio(read.difference, rounding)) if rounding else None,
            within_half_step=within,
            cosine=read.cosine,
            factor=read.product / read.before if read.before else 1.0,
            ranges=(read.low[0], read.high[0], read.low[1], read.high[1]),
            sparsity=(read.zeros[0] / read.size, read.zeros[1] / read.size),
            bits=(old.bits, new.bits),
            dtypes=(old.dtype, new.dtype),
            zeroed_rows=tuple(np.flatnonzero((read.rows.before > 0) & (read.rows.after == 0)).tolist()),
            spectrum=(values.before[:_HEAD], values.after[:_HEAD]) if values else None,
            rank=values.rank if values else None,
            causes=causes,
        )

    def _undo_attention_scale(self, read: DifferenceSums) -> tuple[str, ...]:
        """Undo the attention scale, head_size^(-1/2) or its square root, if a graph has it folded into the weights."""
        if self.sides[0].format == self.sides[1].format or not read.before or read.cosine < _TURNED:
            return ()
        factor = read.product / (read.after if self.swapped else read.before)
        # The factor is head_size^(1/power). A true scale gives an integer head size for one of the powers.
        for power in (2, -2, 4, -4):
            size = factor**-power
            if size > 3 and abs(size - round(size)) < min(0.3, _SCALE_NEAR * abs(power) * size):
                self._scale = np.float32(round(size) ** (-1 / power))
                return (f"times {self._scale:.4g}, attention's scale of heads of {round(size)}",)
        return ()

    def _undo_rotary_order(self, read: DifferenceSums) -> tuple[str, ...]:
        """Undo a permutation of rows that repeats in each head, which formats use for rotary embeddings."""
        before = self.pair.before
        if self.sides[0].format == self.sides[1].format or min(before.flat) < 2 or read.cosine > _TURNED:
            return ()
        permutation = reordered(self.chunks, before.flat, along_rows=True)
        size = None if permutation is None else repeated_within(np.array(permutation.order))
        if permutation is None or size is None:
            return ()
        self.streams, self._whole, self._order = False, None, np.array(permutation.order)
        return (f"the rows of each {size} are permuted, as the format stores them",)

    def _rounding(self, read: DifferenceSums) -> tuple[float, float | None]:
        """Return the squared error that both grids explain, and the share of weights within half a step.

        Rounding to a step s has the error s / sqrt(12) (Bennett 1948). Equal floating-point types are not rounded.
        """
        old, new = self._sides
        explained = 0.0
        if old.dtype != new.dtype:
            for side, squares in ((old, read.before), (new, read.after)):
                # The step of a float lies between epsilon / 2 and epsilon times its value, with uniform error.
                explained += side.epsilon**2 * squares / 24
        # Plain arrays are floats, whose rounding is counted above.
        if self.streams:
            return explained, None
        _, _, steps = self.whole
        within = None
        if self.pair.before.plain is None and (own_steps := self.pair.before.read()[1]) is not None:
            explained += float(np.square(own_steps, dtype=np.float64).sum()) / 12
        if steps is not None:
            explained += float(np.square(steps, dtype=np.float64).sum()) / 12
            before, after, _ = self.whole
            before = before * self._scale
            is_near = np.abs(after - before) <= 0.5 * steps * 1.001 + 1e-6 * np.abs(before)
            within = float(is_near.mean())
        return explained, within

    def _classify(self, read: DifferenceSums, rounding: float) -> tuple[How, float]:
        """Return the kind of a change, and its relative size without the part that rounding explains."""
        if read.difference == 0 and read.not_finite[0] == read.not_finite[1]:
            return "identical", 0.0
        if read.not_finite[1] != read.not_finite[0]:
            return "changed", float("inf")
        if rounding == 0 or self.pair.before.dtype == self.pair.after.dtype == "float32":
            return ("rounded", 0.0) if read.relative <= _SUM_ORDER else ("changed", read.relative)
        remainder = ratio(max(read.difference - rounding, 0.0), read.before)
        # Sums of squares are compared, hence the squared ratio.
        if read.difference > _TIMES_ROUNDING**2 * rounding:
            return "changed", remainder
        # A true factor moves both ways to fit it to the same side of 1. Noise lowers one and raises the other.
        fits = (read.product / read.before, read.after / read.product) if read.before and read.product else (1.0, 1.0)
        deviation = 0.0 if min(fits) <= 1 <= max(fits) else min(abs(fit - 1) for fit in fits)
        return ("changed", deviation) if deviation > _FACTOR else ("rounded", 0.0)


def _finite(value: float) -> float:
    """Replace infinity, which JSON does not have, by 1e9."""
    return value if np.isfinite(value) else 1e9


def _unexplained_squares(tensor: TensorChange) -> float:
    """Return the part of the squared difference that rounding does not explain, infinite for values not finite."""
    if tensor.unexplained > max(tensor.relative, 1.0):
        return float("inf")
    return tensor.squares[1] * (tensor.unexplained / tensor.relative) ** 2 if tensor.relative else 0.0


def layers_changed(tensors: Iterable[TensorChange]) -> tuple[LayerChange, ...]:
    """Return the layers with a changed tensor, the largest unexplained change first.

    The change of a layer is relative to all its weights, so that a bias near 0 doesn't hide its matrix.
    """
    by_layer: dict[str, list[TensorChange]] = defaultdict(list)
    for tensor in tensors:
        by_layer[tensor.layer].append(tensor)
    changes: list[LayerChange] = []
    for name, members in by_layer.items():
        if any(change.how != "identical" for change in members):
            worst = max(members, key=lambda tensor: (_unexplained_squares(tensor), tensor.squares[1]))
            before = sum(tensor.squares[0] for tensor in members)
            unexplained = sum(map(_unexplained_squares, members))
            changes.append(
                LayerChange(
                    name=name,
                    relative=_finite(ratio(sum(tensor.squares[1] for tensor in members), before)),
                    unexplained=_finite(ratio(unexplained, before)),
                    changed=sum(tensor.how == "changed" for tensor in members),
                    tensors=len(members),
                    worst=worst.name,
                    causes=tuple(dict.fromkeys(cause for tensor in members for cause in tensor.causes)),
                )
            )
    return tuple(sorted(changes, key=lambda change: (-change.unexplained, -change.relative)))
