"""The stored tensors of an ONNX file, inside it and in files beside it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np

from compress.formats.onnx.graph import DTYPES, Initializer, OnnxGraph, read_graph
from compress.formats.onnx.names import explain
from compress.models.stored_tensor import StoredTensor, stored
from compress.utils.errors import ModelError

_NUMBERS = {name: number for number, name in DTYPES.items()}


def read_tensors(file: Path, root: Path) -> list[StoredTensor]:
    """Every initializer, its external data checked. Raises `ModelError`."""
    graph = read_graph(file)
    return explained(graph, [_stored(item, file) for item in graph.initializers])


def explained(graph: OnnxGraph, tensors: Sequence[StoredTensor]) -> list[StoredTensor]:
    """The tensors of a graph's initializers, in their order, named and counted by what the graph does with them."""
    return [
        tensor.model_copy(update={**vars(meaning), "origin": tensor.name})
        for tensor, meaning in zip(tensors, explain(graph), strict=True)
    ]


def _stored(item: Initializer, file: Path) -> StoredTensor:
    if not item.external:
        span = item.start, item.stop - item.start
        return stored(item.name, item.dtype, item.shape, file, span, bytes=item.bytes, decode=_parsed)
    path, start, size = _external(item, file)
    decode = partial(_as_typed, _NUMBERS.get(item.dtype, 0), item.shape)
    return stored(item.name, item.dtype, item.shape, path, (start, size), decode=decode, tied_to=f"{path}:{start}")


def _parsed(data: np.ndarray) -> np.ndarray:
    """The values of a whole TensorProto."""
    from onnx import TensorProto, numpy_helper

    array: np.ndarray = numpy_helper.to_array(TensorProto.FromString(data.tobytes()))
    return array


def _as_typed(number: int, shape: tuple[int, ...], data: np.ndarray) -> np.ndarray:
    """The values of raw bytes of a type by its number in ONNX."""
    from onnx import TensorProto, numpy_helper

    array: np.ndarray = numpy_helper.to_array(TensorProto(data_type=number, dims=shape, raw_data=data.tobytes()))
    return array


def _external(item: Initializer, file: Path) -> tuple[Path, int, int]:
    """File, offset and length of a tensor outside its graph. Raises `ModelError` when they can't be right."""
    location = item.external.get("location", "")
    pure = PurePosixPath(location)
    path = file.parent / location
    inside = path.resolve().is_relative_to(file.parent.resolve())
    if not location or pure.is_absolute() or ".." in pure.parts or not inside:
        raise ModelError(
            f"The tensor {item.name!r} names {location!r} as its file, which lies outside the model folder.",
            where=str(file),
            expected="external data beside the ONNX file",
            hint="Save the model again with its data beside it.",
        )
    if not path.is_file():
        raise ModelError(
            f"The file {location!r} with the weights is missing.",
            where=str(file),
            expected=f"{location} beside it",
            hint="Copy the data file along with the ONNX file.",
        )
    return _external_span(item, path)


def _external_span(item: Initializer, path: Path) -> tuple[Path, int, int]:
    size = path.stat().st_size
    try:
        offset = int(item.external.get("offset") or 0)
        length = int(item.external.get("length") or size - offset)
    except ValueError as error:
        raise ModelError(
            f"The place of {item.name!r} in its file is {item.external!r}.",
            where=str(path),
            expected="numbers",
        ) from error
    if offset < 0 or length < 0 or offset + length > size:
        raise ModelError(
            f"The external data is truncated: {item.name!r} ends at byte {offset + length} of {size}.",
            where=str(path),
            hint="Fetch, copy or export the model again.",
        )
    return path, offset, length
