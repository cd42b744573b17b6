"""Weights of a model of any format as float32, with their quantization step, one tensor at a time."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from compress.inspection.tensors import ModelContents
from compress.models.checkpoint import TABLES, Checkpoint
from compress.models.stored_tensor import StoredTensor, numpy_dtype
from compress.plugins.diff.weight_difference import smallest_steps

CHUNK = 1 << 22
"""Number of elements of a chunk of rows, the part of a tensor that is in memory at a time."""
_QUANTIZATION_PARAMETER = re.compile(r"^(?P<weight>.+?)[_/.](?P<part>scale|zero_point|offset)s?$")
"""Name of a tensor with the scales or zero points of a weight, such as `linear.weight_scale`."""
_INTEGER_TYPE = re.compile(r"^(?P<unsigned>u?)(int|i)(?P<bits>\d+)$|^u(?P<bare>\d+)$")
"""Names of integer types as formats write them: `int8`, `uint4`, `i4` or `u4`. ``bare`` are the bits in `u4`."""

ValuesAndSteps = tuple[np.ndarray, np.ndarray | None]
"""Values of a tensor, and the quantization step of each value, or None for floating point."""


@dataclass(frozen=True)
class Weight:
    """Tensor of weights that is read on demand.

    Attributes:
        name: Name of the tensor.
        shape: Shape of its values, which differs from the stored shape if several weights share an integer.
        dtype: Stored type.
        bits: Bits of a stored weight, the scales of block formats included.
        read: Returns all values with their quantization steps.
        plain: Returns the stored array. None if its numbers have to be decoded.
        scaled: False for integers whose scales are unknown, so that values are the integers themselves.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    bits: float
    read: Callable[[], ValuesAndSteps]
    plain: Callable[[], np.ndarray] | None = None
    scaled: bool = True

    @property
    def flat(self) -> tuple[int, int]:
        """Rows and columns of the tensor as a matrix: the first axis, and the product of all others."""
        if len(self.shape) < 2:
            return 1, max(1, math.prod(self.shape))
        return self.shape[0], math.prod(self.shape[1:])

    @property
    def epsilon(self) -> float:
        """Machine epsilon of a floating-point type, or 0 for integers."""
        dtype = numpy_dtype(self.dtype)
        if dtype is None or "float" not in self.dtype:
            return 0.0
        # NumPy does not know bfloat16 and the 8-bit floating-point types.
        import ml_dtypes

        return float(ml_dtypes.finfo(dtype).eps)  # type: ignore[no-untyped-call]

    def transposed(self) -> Weight:
        """Return a transposed matrix, or the tensor itself if it is no matrix."""
        if len(self.shape) != 2:
            return self

        def read() -> ValuesAndSteps:
            values, steps = self.read()
            return values.T, None if steps is None else steps.T

        return replace(self, shape=self.shape[::-1], read=read, plain=None)

    def halves_exchanged(self) -> Weight:
        """Return a weight of 4 bits as if the upper half of each byte came first, so that neighbours are exchanged."""

        def read() -> ValuesAndSteps:
            values, steps = self.read()
            return values.reshape(*values.shape[:-1], -1, 2)[..., ::-1].reshape(values.shape), steps

        return replace(self, read=read)

    def chunks(self) -> Iterator[np.ndarray]:
        """Yield its rows as float32, in chunks."""
        return (np.asarray(part, np.float32) for part in self.stored_chunks())

    def stored_chunks(self) -> Iterator[np.ndarray]:
        """Yield its rows in chunks, in the stored type if the file's bytes are the values."""
        rows, columns = self.flat
        rows_per_chunk = max(1, CHUNK // max(columns, 1))
        matrix = (self.read()[0] if self.plain is None else self.plain()).reshape(rows, columns)
        for start in range(0, rows, rows_per_chunk):
            yield matrix[start : start + rows_per_chunk]


def paired_chunks(one: Weight, other: Weight) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield chunks of both tensors as float32. If their bytes are equal, one array stands for both."""
    for left, right in zip(one.stored_chunks(), other.stored_chunks(), strict=True):
        values = np.asarray(left, np.float32)
        is_equal = left.dtype == right.dtype and np.array_equal(left.view(np.uint8), right.view(np.uint8))
        yield values, values if is_equal else np.asarray(right, np.float32)


def read_weights(contents: ModelContents, folder: Path) -> tuple[dict[str, Weight], list[str]]:
    """Return all weights by name, and reasons for tensors that cannot be read."""
    weights: dict[str, Weight] = {}
    unread: list[str] = []
    # The scales and zero points of each quantized weight, by the weight's name.
    companions: dict[str, dict[str, StoredTensor]] = defaultdict(dict)
    for tensor in contents.tensors:
        if tensor.role == "quantization" and (match := _QUANTIZATION_PARAMETER.match(tensor.name)):
            companions[match["weight"]][match["part"]] = tensor
    for tensor in contents.tensors:
        if tensor.role != "weight" or tensor.tied_to or not tensor.elements:
            continue
        weight = _packed_weight(tensor, folder) or _stored_weight(tensor, companions[tensor.name])
        if weight is None:
            unread.append(f"{tensor.name} is stored as {tensor.dtype} in a layout that isn't read here")
        else:
            weights[weight.name] = weight
    return weights, unread


def _stored_weight(tensor: StoredTensor, companions: Mapping[str, StoredTensor]) -> Weight | None:
    """Return a weight with its scales and zero points, or None for a layout that cannot be read."""
    integer = _INTEGER_TYPE.match(tensor.dtype)
    if integer is None:
        return _floats(tensor) if tensor.readable and "complex" not in tensor.dtype else None
    # Several weights may share a stored integer. The number of parameters then exceeds the number of elements, and
    # ``dtype`` is that of the stored integer, so the bits of a weight follow from the size.
    shares_bytes = tensor.packed and tensor.parameters > tensor.elements
    bits = 8 * tensor.stored_bytes // tensor.parameters if shares_bytes else int(integer["bits"] or integer["bare"])
    if not tensor.readable and 8 % bits:
        # `_unpack` splits single bytes, in which weights of e.g. 3 bits would not end.
        return None
    shape, signed = tensor.shape, not (integer["unsigned"] or integer["bare"])
    if shares_bytes:
        shape = (shape[0], tensor.elements // shape[0] * 8 // bits)
    elif len(shape) == 3 and bits < 8:
        # [rows, blocks, block size], as ONNX Runtime's MatMulNBits stores weights: the blocks of a row are joined.
        shape = (shape[0], shape[1] * shape[2])

    def read() -> ValuesAndSteps:
        return _dequantize(_integers(tensor, bits, signed), companions, bits)

    return Weight(tensor.name, shape, tensor.dtype, bits, read, scaled="scale" in companions)


def _floats(tensor: StoredTensor) -> Weight:
    """Return a weight of a floating-point type or a block format."""
    # NumPy has no type for block formats such as Q4_K. They decode to values on a grid with one step per block.
    dtype = numpy_dtype(tensor.dtype)
    bits = 8 * tensor.stored_bytes / tensor.elements if dtype is None else 8 * dtype.itemsize

    def read() -> ValuesAndSteps:
        values = np.asarray(tensor.values(), np.float32)
        if dtype is not None:
            return values, None
        rows = values.reshape(len(values) if values.ndim > 1 else 1, -1)
        # The step of a block is not stored as such, so it is found as the smallest difference of its values.
        return values, smallest_steps(rows).reshape(values.shape)

    plain = None if dtype is None or tensor.decode is not None else tensor.values
    return Weight(tensor.name, tensor.shape, tensor.dtype, bits, read, plain)


def _packed_weight(tensor: StoredTensor, folder: Path) -> Weight | None:
    """Return a weight in the AutoGPTQ layout, or a weight with stored integer tables. Return None for other tensors."""
    packed = tensor.packed and tensor.name.endswith(".qweight")
    # AutoGPTQ stores `qweight`. This project stores integer tables beside the float weights.
    if not packed and not (tensor.name.endswith(".weight") and (folder / TABLES).is_file()):
        return None
    module, checkpoint = tensor.module, Checkpoint(folder)
    settings = checkpoint.layer_settings(module) if packed else checkpoint.tables.get(module, {})
    if settings.get("bits") is None or settings.get("group_size") is None:
        return None
    bits = int(settings["bits"])

    def read() -> ValuesAndSteps:
        layer = checkpoint.quantized(module)
        assert layer is not None
        values = layer.dequantize().numpy()
        return values, np.repeat(np.abs(layer.scales.numpy()), layer.group_size, axis=1)[:, : values.shape[1]]

    # `qweight` is int32 [in * bits / 32, out], the weight [out, in].
    shape = (tensor.shape[1], tensor.shape[0] * 32 // bits) if packed else tensor.shape
    return Weight(f"{module}.weight", shape, tensor.dtype, bits, read)


def _integers(tensor: StoredTensor, bits: int, signed: bool) -> np.ndarray:
    """Return one integer for each weight in the layout of its scales: [rows, blocks, block size] for block formats."""
    # `values` decodes the stored bytes to one number for each element, `data` returns the bytes.
    is_decoded = tensor.decode is not None or tensor.readable
    stored = tensor.values() if is_decoded else tensor.data()
    if tensor.packed and tensor.parameters > tensor.elements and not is_decoded:
        stored = stored.reshape(tensor.shape)
    if bits >= 8 or (tensor.readable and not tensor.packed) or stored.dtype == np.int8:
        return stored
    unpacked = _unpack(stored, bits)
    if tensor.parameters > tensor.elements:
        # Bytes with several weights are unsigned, whatever the type is called.
        return unpacked.reshape(*stored.shape[:-1], -1)
    # Signed weights are stored in two's complement of ``bits`` bits. This extends their sign to a byte.
    integers = unpacked.reshape(-1)[: tensor.elements].reshape(tensor.shape).astype(np.int8)
    sign_bit = 1 << bits - 1
    return (integers ^ sign_bit) - sign_bit if signed else integers


def _dequantize(integers: np.ndarray, companions: Mapping[str, StoredTensor], bits: int) -> ValuesAndSteps:
    """Return ``(integers - zero_points) * scales``, and the absolute scales as steps."""
    if "scale" not in companions:
        return integers.astype(np.float32), np.ones_like(integers, np.float32)
    scales = np.asarray(companions["scale"].values(), np.float32)
    tensor = companions.get("zero_point") or companions.get("offset")
    if tensor is None:
        # Unsigned weights of less than 8 bits without zero points have the zero point in the middle of their range.
        zeros = np.full(scales.shape, 1 << bits - 1 if bits < 8 and integers.dtype == np.uint8 else 0)
    else:
        zeros = np.asarray(tensor.values() if tensor.readable else tensor.data())
        if zeros.size < scales.size:
            # Zero points are packed like the weights, row by row.
            rows = _unpack(zeros, bits).reshape(len(integers), -1)
            zeros = rows[:, : scales.size // len(integers)]
        zeros = zeros.reshape(scales.shape)
    step, zero = _broadcastable(scales, integers), _broadcastable(zeros.astype(np.float32), integers)
    values = (integers.astype(np.float32) - zero) * step
    # Three axes with several scales per row are [rows, blocks, block size]: the blocks of a row are joined.
    shape = values.shape if values.ndim < 3 or scales.size <= values.shape[0] else (values.shape[0], -1)
    return values.reshape(shape), np.broadcast_to(np.abs(step), values.shape).reshape(shape)


def _unpack(stored: np.ndarray, bits: int) -> np.ndarray:
    """Split each byte into its weights along a new last axis, the lowest bits first."""
    return np.stack([stored >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)], axis=-1)


def _broadcastable(part: np.ndarray, integers: np.ndarray) -> np.ndarray:
    """Reshape scales or zero points so that they broadcast over the integers: per tensor, per axis or per block.

    The format's own axis attribute is not known here, so the axis is inferred.
    """
    if part.size == 1:
        return part.reshape(())
    if part.ndim == integers.ndim and all(a in (1, b) for a, b in zip(part.shape, integers.shape, strict=True)):
        return part
    if integers.ndim == 3 and part.size == integers.shape[0] * integers.shape[1]:
        return part.reshape(*integers.shape[:2], 1)
    if part.ndim == 2 and len(part) == len(integers) and integers.shape[1] % part.shape[1] == 0:
        return part.repeat(integers.shape[1] // part.shape[1], axis=1)

    def low_peak(axis: int) -> float:
        """Return the 10th percentile of the channels' largest magnitudes."""
        # Unsigned 8-bit weights are distances from their usual zero point, 128.
        magnitudes = np.abs(integers.astype(np.int32) - (128 if integers.dtype == np.uint8 else 0))
        others = tuple(index for index in range(integers.ndim) if index != axis)
        return float(np.quantile(magnitudes.max(axis=others), 0.1))

    # If several axes have the right size, take the one on which nearly every channel has a large integer: a channel's
    # scale is chosen so that its largest weight is rounded to an end of the integer range.
    axis = max((axis for axis, size in enumerate(integers.shape) if size == part.size), key=low_peak, default=0)
    return part.reshape([-1 if index == axis else 1 for index in range(integers.ndim)])


@dataclass(frozen=True)
class Pair:
    """Tensor of the first model and its counterpart in the second model.

    Attributes:
        before: Tensor of the first model.
        after: Tensor of the second model, which may contain more than the counterpart.
        by: Rule that matched the pair, `name` or `content`.
        turned: True if ``after`` is transposed.
        start: First row of the counterpart in ``after``.
        count: Number of rows of the counterpart. None for all.
        plus: Row that an exporter added to each row of ``before``, such as a token type embedding.
    """

    before: Weight
    after: Weight
    by: str
    turned: bool = False
    start: int = 0
    count: int | None = None
    plus: np.ndarray | None = None

    @property
    def whole(self) -> bool:
        """True if both tensors have the same layout and can be read in parallel."""
        same_shape = self.before.shape == self.after.shape
        return same_shape and not self.turned and self.count is None and self.plus is None


def aligned_matrices(pair: Pair) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Return both tensors of a pair as matrices of one layout, and the quantization steps of the second."""
    before = np.concatenate(list(pair.before.chunks()))
    before = before if pair.plus is None else before + pair.plus
    values, steps = pair.after.read()
    return before, _in_layout_of_first(pair, values), None if steps is None else _in_layout_of_first(pair, steps)


def _in_layout_of_first(pair: Pair, array: np.ndarray) -> np.ndarray:
    """Return an array of the second tensor as a matrix in the layout of the first."""
    shape, (rows, columns) = pair.before.shape, pair.before.flat
    # Tensors with different numbers of axes are compared as matrices.
    is_matrix = array.ndim == 2 or array.ndim != len(shape)
    if pair.turned and is_matrix:
        array = array.reshape(-1, array.shape[-1]).T
    elif pair.turned:
        # Convolutions that store channels last: [out, height, width, in] becomes [out, in, height, width].
        array = np.moveaxis(array, -1, 1)
    if pair.count is not None:
        array = (array.reshape(-1) if len(shape) < 2 else array)[pair.start :][: pair.count]
    # Pairs that are not marked as turned may store channels last too.
    elif array.ndim > 2 and array.shape != shape and (array.shape[0] != shape[0] or array.shape[-1] == shape[1]):
        array = np.moveaxis(array, -1, 1)
    return np.asarray(array, np.float32).reshape(-1, columns)[:rows]


def row_slice(pair: Pair) -> Weight:
    """Return the rows of ``pair.after`` that match ``pair.before`` as a tensor with the layout of ``pair.before``."""

    after, shape = pair.after, pair.before.shape

    def read() -> ValuesAndSteps:
        values, steps = after.read()
        row_steps = None if steps is None else _in_layout_of_first(pair, steps).reshape(shape)
        return _in_layout_of_first(pair, values).reshape(shape), row_steps

    name = f"{after.name}[{pair.start}:{pair.start + (pair.count or 0)}]"
    return Weight(name, shape, after.dtype, after.bits, read, scaled=after.scaled)
