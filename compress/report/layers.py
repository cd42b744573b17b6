"""Grouping stored tensors by the module they belong to."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from compress.report.schema import BASELINE, FINAL, LayerBytes, Report

UNNAMED = "(no module in the name)"
_SEPARATORS = re.compile(r"[./]+")
_GENERATED = re.compile(r"^(onnx::.*|val_\d+.*|_val_\d+.*|\d+|[a-z]*const(ant)?_?\d*.*)$", re.IGNORECASE)


@dataclass(frozen=True)
class Group:
    """The tensors of one module: bytes in all, and bytes by dtype, the largest first."""

    name: str
    bytes: int
    dtypes: dict[str, int]


@dataclass(frozen=True)
class Share:
    """What one module takes of one model."""

    model: str
    bytes: int
    share: float
    dtypes: str


@dataclass(frozen=True)
class StoredBytes:
    """Model -> its bytes in all, and by module the share of each model, the largest module first."""

    models: dict[str, int]
    modules: tuple[tuple[str, tuple[Share | None, ...]], ...]

    @property
    def largest(self) -> int:
        """Bytes of the largest model, at least 1."""
        return max(1, *self.models.values())


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


def stored_bytes(report: Report) -> StoredBytes:
    """Where the bytes are in the baseline and the final model, else in the first two models known."""
    known = [model for model, layers in report.bytes_by_layer.items() if layers]
    shown = [model for model in (BASELINE, FINAL) if model in known] or known[:2]
    groups = {model: group_by_module(report.bytes_by_layer[model]) for model in shown}
    totals = {model: sum(group.bytes for group in found.values()) for model, found in groups.items()}
    modules = dict.fromkeys(module for found in groups.values() for module in found)
    size = {module: max(found[module].bytes for found in groups.values() if module in found) for module in modules}

    def share(model: str, module: str) -> Share | None:
        group = groups[model].get(module)
        if group is None:
            return None
        return Share(model, group.bytes, group.bytes / totals[model] if totals[model] else 0.0, ", ".join(group.dtypes))

    ordered = sorted(modules, key=lambda module: -size[module])
    return StoredBytes(totals, tuple((module, tuple(share(model, module) for model in shown)) for module in ordered))
