"""Grouping stored tensors by the module they belong to."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from compress.results.report import BASELINE, FINAL, LayerBytes, Report

UNNAMED = "(no module in the name)"
_SEPARATORS = re.compile(r"[./]+")
_GENERATED = re.compile(r"^(onnx::.*|val_\d+.*|_val_\d+.*|\d+|[a-z]*const(ant)?_?\d*.*)$", re.IGNORECASE)


@dataclass(frozen=True)
class StoredBytes:
    """Model -> module -> bytes by dtype, and all modules, the largest first."""

    groups: dict[str, dict[str, dict[str, int]]]
    modules: list[str]

    @property
    def models(self) -> dict[str, int]:
        """Model -> its bytes in all."""
        return {model: sum(sum(dtypes.values()) for dtypes in found.values()) for model, found in self.groups.items()}


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


def group_by_module(layers: Iterable[LayerBytes]) -> dict[str, dict[str, int]]:
    """Module -> bytes by dtype, the largest first; modules in the order of first appearance."""
    found: dict[str, Counter[str]] = {}
    for layer in layers:
        found.setdefault(module_of(layer.name), Counter())[layer.dtype] += layer.bytes
    return {name: dict(dtypes.most_common()) for name, dtypes in found.items()}


def largest(layers: Iterable[LayerBytes], count: int = 12) -> list[LayerBytes]:
    """The tensors that take the most bytes."""
    return sorted(layers, key=lambda layer: -layer.bytes)[:count]


def stored_bytes(report: Report) -> StoredBytes:
    """Where the bytes are in the baseline and the final model, else in the first two models known."""
    known = [model for model, layers in report.bytes_by_layer.items() if layers]
    shown = [model for model in (BASELINE, FINAL) if model in known] or known[:2]
    groups = {model: group_by_module(report.bytes_by_layer[model]) for model in shown}
    sizes: dict[str, int] = {}
    for found in groups.values():
        for module, dtypes in found.items():
            sizes[module] = max(sizes.get(module, 0), sum(dtypes.values()))
    return StoredBytes(groups, sorted(sizes, key=lambda module: -sizes[module]))
