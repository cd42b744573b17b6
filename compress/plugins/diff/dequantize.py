"""The weights of a model of any format as float32, with the step of the grid that they lie on, one at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from compress.inspection.tensors import ModelContents
from compress.models.checkpoint import TABLES, Checkpoint
from compress.models.stored_tensor import StoredTensor, numpy_dtype
from compress.numerics.weight_difference import smallest_steps

CHUNK = 1 << 22
"""Elements that are in memory at once of a tensor that is read in stretches of rows."""
_COMPANION = re.compile(r"^(?P<weight>.+?)[_/.](?P<part>scale|zero_point|offset)s?$")
_INTEGER = re.compile(r"^(?P<unsigned>u?)(int|i)(?P<bits>\d+)$|^u(?P<bare>\d+)$")
_DIGITS = re.compile(r"\d+")

Whole = tuple[np.ndarray, np.ndarray | None]
"""The values of a tensor, and the step of the grid at each; None for floats."""


@dataclass(frozen=True)
class Weight:
    """A tensor of weights. ``read`` gives all of it, ``plain`` its bytes as an array, where they are the values.

    ``bits`` are those of a weight as it is stored; ``scaled`` is False for integers whose scales the file keeps where
    nobody here looks, so that they are known up to a scale for each row.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    bits: float
    read: Callable[[], Whole]
    plain: Callable[[], np.ndarray] | None = None
    scaled: bool = True

    @property
    def flat(self) -> tuple[int, int]:
        """Rows and columns as a matrix: the first axis, and all others."""
        return flat_shape(self.shape)

    @property
    def epsilon(self) -> float:
        """Distance of neighbours over their value, of floats; 0 for integers, whose steps `read` gives."""
        dtype = numpy_dtype(self.dtype)
        if dtype is None or "float" not in self.dtype:
            return 0.0
        import ml_dtypes

        return float(ml_dtypes.finfo(dtype).eps)  # type: ignore[no-untyped-call]

    def transposed(self) -> Weight:
        """A matrix the other way round; anything else as it is."""
        if len(self.shape) != 2:
            return self

        def read() -> Whole:
            values, steps = self.read()
            return values.T, None if steps is None else steps.T

        return replace(self, shape=self.shape[::-1], read=read, plain=None)

    def halves_exchanged(self) -> Weight:
        """Return the weight as read with the upper half of each byte first."""

        def read() -> Whole:
            values, steps = self.read()
            return values.reshape(*values.shape[:-1], -1, 2)[..., ::-1].reshape(values.shape), steps

        return replace(self, read=read)

    def chunks(self) -> Iterator[np.ndarray]:
        """Yield its rows as float32, in chunks."""
        for part in self.stored_chunks():
            yield np.asarray(part, np.float32)

    def stored_chunks(self) -> Iterator[np.ndarray]:
        """Yield its rows in chunks, in the stored type if the file's bytes are the values."""
        rows, columns = self.flat
        step = max(1, CHUNK // max(columns, 1))
        whole = (self.read()[0] if self.plain is None else self.plain()).reshape(rows, columns)
        for start in range(0, rows, step):
            yield whole[start : start + step]


def side_by_side(one: Weight, other: Weight) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Stretches of both as float32; one array twice where their bytes are the same."""
    for mine, theirs in zip(one.stored_chunks(), other.stored_chunks(), strict=True):
        own = np.asarray(mine, np.float32)
        same = mine.dtype == theirs.dtype and np.array_equal(mine.view(np.uint8), theirs.view(np.uint8))
        yield own, own if same else np.asarray(theirs, np.float32)


def flat_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a tensor as a matrix."""
    if len(shape) < 2:
        return 1, max(1, int(np.prod(shape)))
    return shape[0], int(np.prod(shape[1:]))


def weights_of(contents: ModelContents, folder: Path) -> tuple[dict[str, Weight], list[str]]:
    """Every weight by name, and why the others can't be read."""
    found: dict[str, Weight] = {}
    unread: list[str] = []
    companions = _companions(contents.tensors)
    for tensor in contents.tensors:
        if tensor.role != "weight" or tensor.tied_to or not tensor.elements:
            continue
        own = _packed(tensor, folder) or _one(tensor, companions.get(tensor.name, {}))
        if own is None:
            unread.append(f"{tensor.name} is stored as {tensor.dtype} in a layout that isn't read here")
        else:
            found[own.name] = own
    return found, unread


def _companions(tensors: tuple[StoredTensor, ...]) -> Mapping[str, Mapping[str, StoredTensor]]:
    """Weight's name -> its scales and zero points."""
    found: dict[str, dict[str, StoredTensor]] = {}
    for tensor in tensors:
        match = _COMPANION.match(tensor.name) if tensor.role == "quantization" else None
        if match:
            found.setdefault(match["weight"], {})[match["part"]] = tensor
    return found


def _one(tensor: StoredTensor, companions: Mapping[str, StoredTensor]) -> Weight | None:
    integer = _INTEGER.match(tensor.dtype)
    if integer is None:
        return _floats(tensor) if tensor.readable and "complex" not in tensor.dtype else None
    several = tensor.packed and tensor.parameters > tensor.elements
    bits = 8 * tensor.stored_bytes // tensor.parameters if several else int(integer["bits"] or integer["bare"])
    known = "scale" in companions

    def read() -> Whole:
        return _on_grid(_integers(tensor, bits, signed=not (integer["unsigned"] or integer["bare"])), companions, bits)

    if not tensor.readable and 8 % bits:
        return None
    return Weight(tensor.name, _logical_shape(tensor, bits), tensor.dtype, bits, read, scaled=known)


def _floats(tensor: StoredTensor) -> Weight:
    grid = numpy_dtype(tensor.dtype) is None
    bits = 8 * tensor.stored_bytes / tensor.elements if grid else 8 * _itemsize(tensor.dtype)

    def read() -> Whole:
        values = np.asarray(tensor.values(), np.float32)
        return values, smallest_steps(values.reshape(flat_shape(values.shape))).reshape(values.shape) if grid else None

    plain = None if grid or tensor.decode is not None else tensor.values
    return Weight(tensor.name, tensor.shape, tensor.dtype, bits, read, plain)


def _itemsize(dtype: str) -> int:
    found = numpy_dtype(dtype)
    return found.itemsize if found is not None else 4


def _packed(tensor: StoredTensor, folder: Path) -> Weight | None:
    """The weight that AutoGPTQ's layout packs, or has integers beside it, by its module; None for another tensor."""
    packed = tensor.packed and tensor.name.endswith(".qweight")
    if not packed and not (tensor.name.endswith(".weight") and (folder / TABLES).is_file()):
        return None
    module, checkpoint = tensor.module, Checkpoint(folder)
    settings = checkpoint.layer_settings(module) if packed else checkpoint.tables.get(module, {})
    if settings.get("bits") is None or settings.get("group_size") is None:
        return None
    bits = int(settings["bits"])

    def read() -> Whole:
        found = checkpoint.quantized(module)
        assert found is not None
        values = found.dequantize().numpy()
        return values, np.repeat(np.abs(found.scales.numpy()), found.group_size, axis=1)[:, : values.shape[1]]

    shape = (tensor.shape[1], tensor.shape[0] * 32 // bits) if packed else tensor.shape
    return Weight(f"{module}.weight", shape, tensor.dtype, bits, read)


def _logical_shape(tensor: StoredTensor, bits: int) -> tuple[int, ...]:
    """Of the weights, where several lie in a stored integer: blocks of a row behind each other."""
    if tensor.packed and tensor.parameters > tensor.elements:
        return (tensor.shape[0], tensor.elements // tensor.shape[0] * 8 // bits)
    if len(tensor.shape) == 3 and bits < 8:
        return (tensor.shape[0], tensor.shape[1] * tensor.shape[2])
    return tensor.shape


def _integers(tensor: StoredTensor, bits: int, signed: bool) -> np.ndarray:
    """One integer for each weight, shaped as its scales are laid out: [rows, blocks, block] where it has blocks."""
    own = tensor.decode is not None or tensor.readable
    stored = tensor.values() if own else tensor.data()
    if tensor.packed and tensor.parameters > tensor.elements and not own:
        stored = stored.reshape(tensor.shape)
    if bits >= 8 or (tensor.readable and not tensor.packed) or stored.dtype == np.int8:
        return stored
    unpacked = np.stack([stored >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)], axis=-1)
    if tensor.parameters > tensor.elements:
        # A byte of several weights: unsigned, whatever the type is called.
        return unpacked.reshape(*stored.shape[:-1], -1)
    flat = unpacked.reshape(-1)[: tensor.elements].reshape(tensor.shape).astype(np.int8)
    half = 1 << bits - 1
    return (flat ^ half) - half if signed else flat


def _on_grid(integers: np.ndarray, companions: Mapping[str, StoredTensor], bits: int) -> Whole:
    """``(integers - zero points) * scales``, and the scales."""
    if "scale" not in companions:
        return integers.astype(np.float32), np.ones_like(integers, np.float32)
    scales = np.asarray(companions["scale"].values(), np.float32)
    zeros = _zero_points(companions.get("zero_point") or companions.get("offset"), scales, integers, bits)
    step, zero = _laid_out(scales, integers), _laid_out(zeros, integers)
    values = (integers.astype(np.float32) - zero) * step
    shape = values.shape if values.ndim < 3 or scales.size <= values.shape[0] else (values.shape[0], -1)
    return values.reshape(shape), np.broadcast_to(np.abs(step), values.shape).reshape(shape)


def _zero_points(tensor: StoredTensor | None, scales: np.ndarray, integers: np.ndarray, bits: int) -> np.ndarray:
    if tensor is None:
        middle = 1 << bits - 1 if bits < 8 and integers.dtype == np.uint8 else 0
        return np.full(scales.shape, middle, np.float32)
    found = np.asarray(tensor.values() if tensor.readable else tensor.data())
    if found.size < scales.size:
        # As many to a byte as weights are, row by row.
        found = np.stack([found >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)], axis=-1)
        rows = scales.reshape(len(integers), -1)
        found = found.reshape(len(rows), -1)[:, : rows.shape[1]]
    return found.astype(np.float32).reshape(scales.shape)


def _laid_out(part: np.ndarray, integers: np.ndarray) -> Any:
    """Scales or zero points so that they fit the integers: for all, an axis, or blocks."""
    if part.size == 1:
        return part.reshape(())
    if part.ndim == integers.ndim and all(a in (1, b) for a, b in zip(part.shape, integers.shape, strict=True)):
        return part
    if integers.ndim == 3 and part.size == integers.shape[0] * integers.shape[1]:
        return part.reshape(*integers.shape[:2], 1)
    if part.ndim == 2 and len(part) == len(integers) and integers.shape[1] % part.shape[1] == 0:
        return part.repeat(integers.shape[1] // part.shape[1], axis=1)
    axes = [axis for axis, size in enumerate(integers.shape) if size == part.size]
    axis = max(axes, key=lambda one: _fullness(integers, one), default=0)
    return part.reshape([-1 if place == axis else 1 for place in range(integers.ndim)])


def _fullness(integers: np.ndarray, axis: int) -> float:
    """How far the least of all channels reaches: by their own scale all reach to an end of the grid."""
    others = tuple(place for place in range(integers.ndim) if place != axis)
    reach = np.abs(integers.astype(np.int32) - (128 if integers.dtype == np.uint8 else 0)).max(axis=others)
    return float(np.quantile(reach, 0.1))
