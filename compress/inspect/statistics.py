"""What the values of weights are like, read tensor by tensor from mapped files."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from pydantic import Field

from compress.checkpoints.safetensors_file import StoredTensor, load_array, numpy_type
from compress.formats.tensor import Contents, Format, TensorInfo
from compress.frozen import Frozen
from compress.progress import Progress

OUTLIER_SIGMAS = 6.0
CHUNK_ELEMENTS = 1 << 20


class TensorStatistics(Frozen):
    """Of a tensor's finite values: stored integers of a quantized ONNX weight, dequantized values in GGUF."""

    sparsity: float = Field(description="share of values that are exactly zero")
    minimum: float
    maximum: float
    mean: float
    std: float = Field(description="population standard deviation")
    outliers: float = Field(description="share of values further than 6 standard deviations from the mean")
    not_finite: int = Field(description="number of NaN and infinite values")


def measure_weights(contents: Contents, progress: Progress) -> dict[str, TensorStatistics]:
    """Tensor name -> statistics, of every weight but packed and sub-byte ones."""
    readable = [tensor for tensor in contents.tensors if _readable(tensor, contents.format)]
    measured = {}
    for tensor in progress.track(readable, "reading weights", len(readable)):
        measured[tensor.name] = describe(load_values(tensor, contents.format))
    return measured


def load_values(tensor: TensorInfo, form: Format) -> np.ndarray:
    """The values of a tensor, mapped or dequantized; GGUF tensors come as fp32."""
    if form == "safetensors":
        return load_array(
            StoredTensor(tensor.name, tensor.dtype, tensor.shape, tensor.path, tensor.start, tensor.stored_bytes)
        )
    data = np.memmap(tensor.path, np.uint8, mode="r", offset=tensor.start, shape=(tensor.stored_bytes,))
    if form == "gguf":
        return _dequantized(tensor, data)
    if form in ("ort", "openvino", "executorch", "litert", "coreml"):
        return data.view(tensor.dtype).reshape(tensor.shape)
    import onnx
    from onnx import numpy_helper

    proto = onnx.TensorProto.FromString(data.tobytes())
    array: np.ndarray = numpy_helper.to_array(proto, base_dir=str(tensor.path.parent))
    return array


def describe(values: np.ndarray) -> TensorStatistics:
    """Statistics of an array of at least one value, in double precision and in three passes over pieces."""
    flat = values.reshape(-1)
    count = zeros = 0
    total, low, high = 0.0, math.inf, -math.inf
    for piece in _finite_pieces(flat):
        count += piece.size
        zeros += piece.size - int(np.count_nonzero(piece))
        total += float(piece.sum())
        if piece.size:
            low, high = min(low, float(piece.min())), max(high, float(piece.max()))
    if not count:
        nothing = math.nan
        return TensorStatistics(
            sparsity=0,
            minimum=nothing,
            maximum=nothing,
            mean=nothing,
            std=nothing,
            outliers=0,
            not_finite=flat.size,
        )
    mean = total / count
    std = math.sqrt(sum(float(np.square(piece - mean).sum()) for piece in _finite_pieces(flat)) / count)
    far = sum(int(np.count_nonzero(np.abs(piece - mean) > OUTLIER_SIGMAS * std)) for piece in _finite_pieces(flat))
    return TensorStatistics(
        sparsity=zeros / count,
        minimum=low,
        maximum=high,
        mean=mean,
        std=std,
        outliers=far / count,
        not_finite=flat.size - count,
    )


def _finite_pieces(flat: np.ndarray) -> Iterator[np.ndarray[Any, np.dtype[np.float64]]]:
    for start in range(0, flat.size, CHUNK_ELEMENTS):
        piece = flat[start : start + CHUNK_ELEMENTS].astype(np.float64)
        yield piece[np.isfinite(piece)]


def _readable(tensor: TensorInfo, form: Format) -> bool:
    if tensor.role != "weight" or tensor.packed or tensor.tied_to or not math.prod(tensor.shape):
        return False
    if form != "safetensors":
        return True
    return "complex" not in tensor.dtype and numpy_type(tensor.dtype) is not None


def _dequantized(tensor: TensorInfo, data: np.ndarray) -> np.ndarray:
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    kind = GGMLQuantizationType[tensor.dtype]
    if kind.name in ("I8", "I16", "I32", "I64", "F64"):
        return data.view(np.dtype(f"{'float' if kind.name == 'F64' else 'int'}{kind.name[1:]}"))
    if kind.name in ("F32", "F16"):
        return data.view(np.dtype(f"float{kind.name[1:]}"))
    values: np.ndarray = dequantize(data.reshape(-1, data.size // max(1, math.prod(tensor.shape[:-1]))), kind)
    return values
