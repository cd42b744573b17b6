"""A heat map of two models' weights: a row for each layer, a column for each kind of part, the darker the further."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

from compress.inspection.layers import reading_order
from compress.plugins.diff.record import TensorChange
from compress.report.plot import element, format_coordinate, text, with_tooltip
from compress.results.formatting import format_number

_MOST_KINDS = 12
_ROW, _CELL, _NAME, _HEAD = 24.0, 74.0, 8.2, 118.0
_FAINTEST, _DEEPEST = 1e-4, 1.0
WHOLE = "whole"


def cells(tensors: Sequence[TensorChange]) -> dict[tuple[str, str], list[TensorChange]]:
    """(layer, kind) -> its tensors; kinds of one parent are one where there would be too many."""
    depth = max((one.kind.count(".") + 1 for one in tensors), default=1)
    while True:
        found: dict[tuple[str, str], list[TensorChange]] = defaultdict(list)
        for one in tensors:
            found[one.layer, ".".join(one.kind.split(".")[:depth])].append(one)
        if depth == 1 or len({kind for _, kind in found}) <= _MOST_KINDS:
            return found
        depth -= 1


def heat_map(tensors: Sequence[TensorChange]) -> str:
    """The chart; each cell says in words what it stands for."""
    found = cells(tensors)
    layers = sorted({layer for layer, _ in found}, key=reading_order)
    kinds = list(dict.fromkeys(kind for _, kind in found))
    left = max(map(len, layers), default=1) * _NAME + 14
    width, height = left + _CELL * len(kinds) + 46, _HEAD + _ROW * len(layers) + 6
    parts = [_head(kind, left + _CELL * (place + 0.5)) for place, kind in enumerate(kinds)]
    for line, layer in enumerate(layers):
        y = _HEAD + _ROW * line
        parts.append(text(left - 10, y + 16, layer, "tick", "end"))
        parts += [
            _cell(found[layer, kind], layer, kind, left + _CELL * place, y)
            for place, kind in enumerate(kinds)
            if (layer, kind) in found
        ]
    box = {
        "viewBox": f"0 0 {format_coordinate(width)} {format_coordinate(height)}",
        "class": "heat",
        "width": format_coordinate(width),
    }
    return element("svg", {**box, "role": "img", "aria-label": "change of the weights by layer and kind"}, *parts)


def _head(kind: str, x: float) -> str:
    """The name of a column, turned so that long ones fit."""
    y = _HEAD - 8
    turned = f"rotate(-38 {format_coordinate(x)} {format_coordinate(y)})"
    place: dict[str, str | float | None] = {"x": x, "y": y, "text-anchor": "start", "transform": turned}
    return element("text", {**place, "class": "tick"}, kind)


def _cell(members: Sequence[TensorChange], layer: str, kind: str, x: float, y: float) -> str:
    worst = max(members, key=lambda one: (one.unexplained, one.relative))
    state = worst.how
    shade = None if state == "identical" else format_coordinate(0.12 + 0.88 * depth(worst.relative))
    box: dict[str, str | float | None] = {"x": x + 1, "y": y + 1, "width": _CELL - 2, "height": _ROW - 2, "rx": 3.0}
    box |= {"class": state, "fill-opacity": shade}
    words = "=" if state == "identical" else f"{format_number(worst.relative * 100, 2)}%"
    deep = "deep" if state == "changed" and depth(worst.relative) > 0.55 else ""
    causes = "".join(f"; {cause}" for cause in worst.causes)
    tip = f"{layer} {kind}: {worst.name} {state}, {'0%' if words == '=' else words}{causes}"
    shape = element("rect", box)
    return with_tooltip("cell", tip, shape, text(x + _CELL / 2, y + 16, words, f"figure {deep}".strip()))


def depth(relative: float) -> float:
    """Return the darkness of a change from 0 to 1, by its logarithm."""
    inside = min(max(relative, _FAINTEST), _DEEPEST)
    return math.log(inside / _FAINTEST) / math.log(_DEEPEST / _FAINTEST)
