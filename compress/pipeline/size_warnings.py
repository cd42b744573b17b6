"""Warnings of a final model that is larger than the given one, or hardly smaller, with the field that helps."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from compress.inspection.tensors import read_model
from compress.models.stored_tensor import StoredTensor
from compress.recipe.recipe import Recipe
from compress.results.formatting import format_bytes
from compress.sources.onnx_file import onnx_file
from compress.stages.cost_model import Shape
from compress.stages.protocols import integer_weights
from compress.tasks.capability import GENERATES
from compress.tasks.registry import TASKS
from compress.utils.storage import size_bytes

_TABLE = re.compile(r"embed|embd|wte|lm_head")
_FLOAT = re.compile(r"b?float|b?f(16|32)")
_SCALE_BITS = 16 / 32
"""Bits per weight of the scales, with groups of 32 weights."""
_HARDLY_SMALLER = 0.9
"""Share of the given bytes above which quantization has left most weights in float."""


@dataclass(frozen=True)
class _Part:
    """The largest part of a model: its description, its bytes and its number of weights."""

    name: str
    bytes: float
    weights: float
    is_table: bool
    is_float: bool


def given_bytes(path: Path) -> int:
    """Return the bytes on disk of a given model: of a file with its external data, or of all files of a folder."""
    if path.is_dir():
        return size_bytes(path)
    files = read_model(path).files if onnx_file(path) else (path,)
    return sum(file.stat().st_size for file in files)


def measured_warnings(recipe: Recipe, given: Path, final: Path, others: Mapping[str, Path]) -> list[str]:
    """Return a warning for each folder of the final model that is larger than the given one, or hardly smaller.

    Args:
        recipe: The recipe.
        given: File or folder of the given model.
        final: Output of the last stage.
        others: Folders of the final model by target, which may be ``final``.
    """
    if recipe.module is not None or recipe.random_weights:
        return []
    before, warnings = given_bytes(given), []
    targets = {folder: f" for {target}" for target, folder in others.items()}
    for folder, target in {**targets, final: ""}.items():
        after = size_bytes(folder)
        hint = _float_hint(recipe, given) if _HARDLY_SMALLER * before < after <= before else None
        if after > before or hint:
            largest = max(read_model(folder).tensors, key=lambda tensor: tensor.bytes)
            name = f"{_described(largest)} in {largest.dtype}"
            if hint:
                sizes = f"{format_bytes(after)} instead of {format_bytes(before)}"
                small = f"The final model{target} is hardly smaller than {given.name}: {sizes}."
                warnings.append(f"{small} Its largest tensor is {name}. {hint}.")
                continue
            is_float, is_table = bool(_FLOAT.match(largest.dtype.lower())), bool(_TABLE.search(largest.name))
            part = _Part(name, largest.bytes, math.prod(largest.shape), is_table, is_float)
            warnings.append(f"The final model{target} is {_comparison(recipe, given.name, before, after, part)}")
    return warnings


def predicted_warning(recipe: Recipe, given: Path, shape: Shape | None, after: float | None) -> str | None:
    """Return a warning if the final model is predicted to be larger than the given model.

    Args:
        recipe: The recipe.
        given: File or folder of the given model.
        shape: Predicted shape of the final model.
        after: Its predicted bytes.
    """
    if shape is None or after is None or after <= (before := given_bytes(given)):
        return None
    tables, matrices = shape.embeddings * shape.table_bits / 8, shape.working * shape.matrix_bits / 8
    if tables >= matrices:
        stored = (tensor for tensor in read_model(given).tensors if _TABLE.search(tensor.name))
        largest = max(stored, key=lambda tensor: tensor.parameters, default=None)
        name = f"{_described(largest) if largest else 'embedding tables'} at {shape.table_bits} bits"
        part = _Part(name, tables, shape.embeddings, True, shape.table_bits >= 16)
    else:
        name = f"matrices at {shape.matrix_bits} bits"
        part = _Part(name, matrices, shape.working, False, shape.matrix_bits >= 16)
    return f"The final model will be {_comparison(recipe, recipe.model, before, after, part)}"


def _float_hint(recipe: Recipe, given: Path) -> str | None:
    """Return the advice of a stage that quantizes only some operators of a given ONNX file; None without such a stage.

    A result from a checkpoint is compared by the integrity check instead.
    """
    specs = [stage.output_spec() for stage in recipe.stages] if onnx_file(given) else []
    return next((spec.hint for spec in specs if spec.integer_graph and spec.hint), None)


def _comparison(recipe: Recipe, given: str, before: float, after: float, part: _Part) -> str:
    """Return both sizes, the largest part, and the field that makes it smaller if there is one."""
    sizes = f"larger than {given}: {format_bytes(round(after))} instead of {format_bytes(before)}"
    largest = f"{format_bytes(round(part.bytes))} of it are {part.name}"
    found = _remedy(recipe, part, before - (after - part.bytes)) if part.is_float else None
    if found is None:
        return f"{sizes}. {largest}."
    field, bits = found
    smaller = part.weights * (bits + _SCALE_BITS) / 8
    return (
        f"{sizes}. {largest}. With {field} these would be about {format_bytes(round(smaller))}, and the "
        f"model {format_bytes(round(after - part.bytes + smaller))}."
    )


def _described(tensor: StoredTensor) -> str:
    """Return a tensor's name and shape."""
    return f"{tensor.name} {list(tensor.shape)}"


def _remedy(recipe: Recipe, part: _Part, room: float) -> tuple[str, int] | None:
    """Return the field that stores a float tensor as integers, and the bits: 8, or 4 if 8 do not fit into ``room``."""
    for label, stage in zip(recipe.labels(), recipe.stages, strict=True):
        writes_integers = bool(integer_weights(stage)) or stage.output_spec().integer_graph
        if not writes_integers:
            continue
        if not part.is_table or not hasattr(stage, "embedding_bits"):
            return None
        bits = 8 if part.weights * (8 + _SCALE_BITS) / 8 <= room else 4
        return f"`{label}: {{embedding_bits: {bits}}}`", bits
    if GENERATES in TASKS[recipe.task].capabilities:
        return "the stage `gptq`", 4
    return "the stage `onnx_int8`", 8
