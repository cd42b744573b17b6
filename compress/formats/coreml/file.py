"""What a Core ML package stores: constants of its program (MIL), by the package's own messages and blobs."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from compress.errors import MissingExtraError, ModelError
from compress.formats.coreml.quiet import quiet_coreml

_BLOB = struct.Struct("<IIQQ")
"""Of each constant in the file of weights: a mark, its type, its bytes and where they begin."""
_MARK = 0xDEADBEEF
_NUMPY = {
    "FLOAT16": "float16", "FLOAT32": "float32", "FLOAT64": "float64", "BOOL": "bool", "INT8": "int8", "INT16": "int16",
    "INT32": "int32", "INT64": "int64", "UINT8": "uint8", "UINT16": "uint16", "UINT32": "uint32", "UINT64": "uint64",
}  # fmt: skip

ARRAY_TYPES = {65552: "float16", 65568: "float32", 65600: "float64", 131104: "int32"}
"""Core ML's numbers of what an array holds (`ArrayFeatureType.ArrayDataType`)."""

Content = bytes
"""Of a whole file; a constant's own `bytes` is a number."""


@dataclass(frozen=True)
class MilConstant:
    """A stored constant: its numpy type, or `int4`, and its place among the weights.

    ``scale``: it belongs to integers as their scale or offset. ``scaled_by`` is the scale of
    integers, float32 with as many axes as they have.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    bytes: int
    scale: bool = False
    scaled_by: np.ndarray | None = field(default=None, repr=False, compare=False)

    @property
    def floats(self) -> bool:
        """Whether it holds floating-point numbers."""
        return self.dtype.startswith("float")

    def values(self, weights: Content) -> np.ndarray:
        """Its values in the ``weights`` of the whole file, of `int4` the lower half of a byte first."""
        stored = np.frombuffer(weights, np.uint8, self.bytes, self.start)
        if self.dtype != "int4":
            return stored.view(self.dtype).reshape(self.shape)
        halves = np.stack([stored & 15, stored >> 4], axis=-1).reshape(-1)[: math.prod(self.shape)]
        return (halves.astype(np.int8) ^ 8).reshape(self.shape) - np.int8(8)


@dataclass(frozen=True)
class MilProgram:
    """Inputs by name with the lowest and highest length of each axis; outputs with theirs, None where it depends;
    numpy's types of both; operators, and stored constants.
    """

    version: int
    inputs: dict[str, tuple[tuple[int, int], ...]]
    outputs: dict[str, tuple[int | None, ...]]
    types: dict[str, str]
    operators: tuple[str, ...]
    constants: tuple[MilConstant, ...]


def read_coreml(specification: bytes, weights: bytes, where: Path) -> MilProgram:
    """A program's parts. Raises `ModelError` for what is broken, `MissingExtraError` without coremltools."""
    try:
        with quiet_coreml():
            from coremltools.proto import MIL_pb2, Model_pb2
            from google.protobuf.message import DecodeError
    except ImportError as error:
        raise MissingExtraError("coremltools", "coreml", "Looking into a .mlpackage") from error
    try:
        model = Model_pb2.Model.FromString(specification)
    except DecodeError as error:
        raise _broken(f"The specification cannot be read: {error}", where) from error
    if model.WhichOneof("Type") != "mlProgram" or "main" not in model.mlProgram.functions:
        raise _broken("The specification holds no program.", where)
    function = model.mlProgram.functions["main"]
    operations = [one for block in function.block_specializations.values() for one in block.operations]
    lengths = {value.name: _lengths(value.type.tensorType) for one in operations for value in one.outputs}
    return MilProgram(
        version=model.specificationVersion,
        inputs={one.name: _axes(one.type.multiArrayType) for one in model.description.input},
        outputs={one.name: lengths.get(one.name, ()) for one in model.description.output},
        types={
            one.name: ARRAY_TYPES.get(one.type.multiArrayType.dataType, "other")
            for one in (*model.description.input, *model.description.output)
        },
        operators=tuple(one.type for one in operations if one.type != "const"),
        constants=tuple(_constants(operations, MIL_pb2.DataType.Name, weights, where)),
    )


def _axes(kind: Any) -> tuple[tuple[int, int], ...]:
    if kind.WhichOneof("ShapeFlexibility") == "shapeRange":
        return tuple((axis.lowerBound, axis.upperBound) for axis in kind.shapeRange.sizeRanges)
    return tuple((axis, axis) for axis in kind.shape)


def _lengths(kind: Any) -> tuple[int | None, ...]:
    known = (axis.WhichOneof("dimension") == "constant" for axis in kind.dimensions)
    return tuple(axis.constant.size if fixed else None for axis, fixed in zip(kind.dimensions, known, strict=True))


def _constants(operations: list[Any], type_name: Any, weights: bytes, where: Path) -> Iterator[MilConstant]:
    """Those in the file of weights, each once: of constants, and of what is made of integers when it is loaded."""

    def stored(name: str, value: Any, **more: Any) -> tuple[int, MilConstant]:
        kind, offset = value.type.tensorType, value.blobFileValue.offset
        start, size = _blob(weights, offset, name, where)
        shape, dtype = tuple(axis.constant.size for axis in kind.dimensions), type_name(kind.dataType)
        found = MilConstant(name, _NUMPY.get(dtype, dtype.lower()), shape, start, size, **more)
        if found.dtype in _NUMPY.values() and size != math.prod(shape) * np.dtype(found.dtype).itemsize:
            raise _broken(f"The constant {name!r} has {size} bytes, which {dtype} {list(shape)} does not take.", where)
        return offset, found

    known: dict[int, MilConstant] = {}
    for one in operations:
        name = one.outputs[0].name if one.outputs else one.type
        if one.type == "const":
            found = [stored(name, one.attributes["val"])] if _in_blob(one.attributes["val"]) else []
        elif one.type.startswith("constexpr_"):
            given = {key: bound.arguments[0].value for key, bound in one.inputs.items() if bound.arguments}
            held = {key: value for key, value in given.items() if _in_blob(value)}
            scales = {key: stored(f"{name}.{key}", value, scale=True) for key, value in held.items() if key != "data"}
            step = _immediate(given["scale"]) if "scale" in given and "scale" not in scales else None
            if "scale" in scales:
                step = scales["scale"][1].values(weights).astype(np.float32)
            found = [stored(name, held["data"], scaled_by=step)] if "data" in held else []
            found += scales.values()
        else:
            continue
        for offset, constant in found:
            known.setdefault(offset, constant)
    yield from known.values()


def _immediate(value: Any) -> np.ndarray:
    """A small constant, which lies in the program itself."""
    tensor = value.immediateValue.tensor
    shape = [axis.constant.size for axis in value.type.tensorType.dimensions]
    if tensor.WhichOneof("value") == "bytes":
        return np.frombuffer(tensor.bytes.values, np.float16).astype(np.float32).reshape(shape)
    return np.asarray(tensor.floats.values, np.float32).reshape(shape)


def _in_blob(value: Any) -> bool:
    return bool(value.HasField("blobFileValue"))


def _blob(weights: bytes, offset: int, name: str, where: Path) -> tuple[int, int]:
    if offset + _BLOB.size <= len(weights):
        mark, _, size, start = _BLOB.unpack_from(weights, offset)
        if mark == _MARK and start + size <= len(weights):
            return start, size
    raise _broken(f"The constant {name!r} is not whole in the {len(weights)} bytes of weights.", where)


def _broken(what: str, where: Path) -> ModelError:
    return ModelError(
        what,
        where=str(where),
        mend="write it again with the stage coreml, or copy the folder again with all of its files",
    )
