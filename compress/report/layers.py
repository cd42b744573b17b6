"""Grouping stored tensors by the module they belong to."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from compress.report.schema import LayerBytes

UNNAMED = "(no module in the name)"
_SEPARATORS = re.compile(r"[./]+")
_GENERATED = re.compile(r"^(onnx::.*|val_\d+.*|_val_\d+.*|\d+|[a-z]*const(ant)?_?\d*.*)$", re.IGNORECASE)


@dataclass(frozen=True)
class Group:
    """The tensors of one module: bytes in all, and bytes by dtype, the largest first."""

    name: str
    bytes: int
    dtypes: dict[str, int]


def module_of(name: str) -> str:
    """`bert.encoder.layer.3.attention.self.query.weight` -> `bert.encoder.layer.3`.

    The path up to its first number; without a number, its first two parts, less the tensor's own name.
    """
    parts = [part for part in _SEPARATORS.split(name) if part]
    if not parts or _GENERATED.match(name.strip("/")):
        return UNNAMED
    for place, part in enumerate(parts[:-1]):
        if part.isdigit() and place > 0:
            return ".".join(parts[: place + 1])
    return ".".join(parts[:-1][:2]) or UNNAMED


def group_by_module(layers: Iterable[LayerBytes]) -> dict[str, Group]:
    """Module -> its tensors, in the order of first appearance."""
    found: dict[str, dict[str, int]] = {}
    for layer in layers:
        dtypes = found.setdefault(module_of(layer.name), {})
        dtypes[layer.dtype] = dtypes.get(layer.dtype, 0) + layer.bytes
    return {
        name: Group(name, sum(dtypes.values()), dict(sorted(dtypes.items(), key=lambda item: -item[1])))
        for name, dtypes in found.items()
    }


def largest(layers: Iterable[LayerBytes], count: int = 12) -> list[LayerBytes]:
    """The tensors that take the most bytes."""
    return sorted(layers, key=lambda layer: -layer.bytes)[:count]


def union(*groups: dict[str, Group]) -> Sequence[str]:
    """Every module of any model, the largest first."""
    names = dict.fromkeys(name for group in groups for name in group)
    return sorted(names, key=lambda name: -max(group[name].bytes for group in groups if name in group))
