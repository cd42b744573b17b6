"""Stored tensors of a report, grouped by module."""

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
class ModuleBytes:
    """Model -> module -> bytes by dtype, and all modules, the largest first."""

    groups: dict[str, dict[str, dict[str, int]]]
    modules: list[str]

    @property
    def models(self) -> dict[str, int]:
        """Return the total bytes of each model."""
        return {
            model: sum(sum(dtypes.values()) for dtypes in modules.values()) for model, modules in self.groups.items()
        }


def module_of(name: str) -> str:
    """Return the module of a tensor: `bert.encoder.layer.3.attention.self.query.weight` -> `bert.encoder.layer.3`.

    It is the path up to its first number, or else its first two parts without the tensor's own name.
    """
    parts = [part for part in _SEPARATORS.split(name) if part]
    if not parts or _GENERATED.match(name.strip("/")):
        return UNNAMED
    for index, part in enumerate(parts[:-1]):
        if part.isdigit() and index > 0:
            return ".".join(parts[: index + 1])
    return ".".join(parts[:-1][:2]) or UNNAMED


def group_by_module(layers: Iterable[LayerBytes]) -> dict[str, dict[str, int]]:
    """Return module -> bytes by dtype, the largest first, with modules in the order of first appearance."""
    modules: dict[str, Counter[str]] = {}
    for layer in layers:
        modules.setdefault(module_of(layer.name), Counter())[layer.dtype] += layer.bytes
    return {name: dict(dtypes.most_common()) for name, dtypes in modules.items()}


def largest(layers: Iterable[LayerBytes], count: int = 12) -> list[LayerBytes]:
    """Return the tensors with the most bytes."""
    return sorted(layers, key=lambda layer: -layer.bytes)[:count]


def module_bytes(report: Report) -> ModuleBytes:
    """Return the stored bytes of the baseline and the final model, or else of the first two models."""
    available = [model for model, layers in report.bytes_by_layer.items() if layers]
    shown = [model for model in (BASELINE, FINAL) if model in available] or available[:2]
    groups = {model: group_by_module(report.bytes_by_layer[model]) for model in shown}
    sizes: dict[str, int] = {}
    for modules in groups.values():
        for module, dtypes in modules.items():
            sizes[module] = max(sizes.get(module, 0), sum(dtypes.values()))
    return ModuleBytes(groups, sorted(sizes, key=lambda module: -sizes[module]))
