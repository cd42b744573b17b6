"""A Core ML package as a folder. Importing this imports no coremltools."""

from __future__ import annotations

import hashlib
import json
import math
import struct
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from compress.formats.model_file import FileModel
from compress.formats.quiet_output import suppress_output
from compress.models.stored_tensor import StoredTensor, infer_role, stored
from compress.utils.errors import MissingExtraError, incomplete_artifact_error, unreadable_file_error

PACKAGE = "model.mlpackage"
"""A folder, which Finder and Xcode show as one file."""
_AUTHOR = "com.apple.CoreML"
_SPECIFICATION = f"{_AUTHOR}/model.mlmodel"
_WEIGHTS = f"{_AUTHOR}/weights"
_NAMES = uuid.uuid5(uuid.NAMESPACE_DNS, _AUTHOR)

_BLOB = struct.Struct("<IIQQ")
"""Of each constant in the file of weights: a mark, its type, its bytes and where they begin."""
_MARK = 0xDEADBEEF
_NUMPY = {
    "FLOAT16": "float16", "FLOAT32": "float32", "FLOAT64": "float64", "BOOL": "bool", "INT8": "int8", "INT16": "int16",
    "INT32": "int32", "INT64": "int64", "UINT8": "uint8", "UINT16": "uint16", "UINT32": "uint32", "UINT64": "uint64",
}  # fmt: skip

ARRAY_TYPES = {65552: "float16", 65568: "float32", 65600: "float64", 131104: "int32"}
"""Core ML's numbers of what an array holds (`ArrayFeatureType.ArrayDataType`)."""

_INDICES = ("int16", "uint16")
"""Of look-ups in small tables: Core ML has no wider integers in its file of weights."""


class CoreMlModel(FileModel):
    """The package: Core ML's message, its weights, and the list of both."""

    kind = "coreml"

    @classmethod
    def files_with(cls, file: Path) -> tuple[Path, ...]:
        """See `FileModel.files_with`."""
        weights_of(specification_of(file))
        return tuple(sorted(path for path in file.rglob("*") if path.is_file()))

    @property
    def specification(self) -> bytes:
        """Core ML's message."""
        return self.own[f"{PACKAGE}/Data/{_SPECIFICATION}"]

    @property
    def weights(self) -> bytes:
        """Its blobs."""
        return self.own[f"{PACKAGE}/Data/{_WEIGHTS}/weight.bin"]


def package_of(specification: bytes, weights: bytes) -> dict[str, bytes]:
    """The files of the package with both, and their list under ids of their content: coremltools' are new each time."""
    root = _item_id(specification)
    items = {
        _item_id(weights, b"weights"): {"description": "CoreML Model Weights", "name": "weights", "path": _WEIGHTS},
        root: {"description": "CoreML Model Specification", "name": "model.mlmodel", "path": _SPECIFICATION},
    }
    told = {
        "fileFormatVersion": "1.0.0",
        "itemInfoEntries": {name: {"author": _AUTHOR, **item} for name, item in items.items()},
        "rootModelIdentifier": root,
    }
    return {
        f"{PACKAGE}/Data/{_SPECIFICATION}": specification,
        f"{PACKAGE}/Data/{_WEIGHTS}/weight.bin": weights,
        # As Core ML's own library writes it, which does so again whenever it opens a package.
        f"{PACKAGE}/Manifest.json": (json.dumps(told, indent=4, sort_keys=True) + "\n").encode(),
    }


def _item_id(content: bytes, kind: bytes = b"model") -> str:
    return str(uuid.uuid5(_NAMES, hashlib.sha256(kind + content).hexdigest()))


def specification_of(package: Path) -> Path:
    """The message within a package. Raises `ModelError` where it is missing."""
    return _there(package / "Data" / _SPECIFICATION, package)


def weights_of(specification: Path) -> Path:
    """The weights beside a specification. Raises `ModelError` where they are missing."""
    return _there(specification.parent / "weights" / "weight.bin", specification.parent)


def _there(file: Path, package: Path) -> Path:
    if not file.is_file():
        within = f"{file.relative_to(package).as_posix()} within it"
        raise incomplete_artifact_error(f"The package lacks {file.name}.", package, within)
    return file


@dataclass(frozen=True)
class MilProgram:
    """Inputs by name with the lowest and highest length of each axis; outputs with theirs, None where it depends;
    numpy's types of both; operators, stored constants, and the steps that constants of integers count in.

    A constant has numpy's type, or `int4`, and lies among the weights; its step is float32 with as many axes.
    """

    version: int
    inputs: dict[str, tuple[tuple[int, int], ...]]
    outputs: dict[str, tuple[int | None, ...]]
    types: dict[str, str]
    operators: tuple[str, ...]
    constants: tuple[StoredTensor, ...]
    steps: dict[str, np.ndarray]


def read_tensors(file: Path, root: Path) -> list[StoredTensor]:
    """The constants of a package's specification, which lie in the file of its weights."""
    weights = weights_of(file)
    return list(read_coreml(file.read_bytes(), weights.read_bytes(), file, weights).constants)


def read_coreml(specification: bytes, weights: bytes, where: Path, weights_file: Path = Path()) -> MilProgram:
    """A program's parts. Raises `ModelError` for what is broken, `MissingExtraError` without coremltools."""
    try:
        with suppress_output("prints"):
            from coremltools.proto import MIL_pb2, Model_pb2
            from google.protobuf.message import DecodeError
    except ImportError as error:
        raise MissingExtraError("coremltools", "coreml", "Looking into a .mlpackage") from error
    try:
        model = Model_pb2.Model.FromString(specification)
    except DecodeError as error:
        raise unreadable_file_error(f"The specification cannot be read: {error}", where, "coreml") from error
    if model.WhichOneof("Type") != "mlProgram" or "main" not in model.mlProgram.functions:
        raise unreadable_file_error("The specification holds no program.", where, "coreml")
    function = model.mlProgram.functions["main"]
    operations = [one for block in function.block_specializations.values() for one in block.operations]
    lengths = {value.name: _lengths(value.type.tensorType) for one in operations for value in one.outputs}
    constants = _Constants(weights, weights_file, where, MIL_pb2.DataType.Name)
    for one in operations:
        constants.read(one)
    return MilProgram(
        version=model.specificationVersion,
        inputs={one.name: _axes(one.type.multiArrayType) for one in model.description.input},
        outputs={one.name: lengths.get(one.name, ()) for one in model.description.output},
        types={
            one.name: ARRAY_TYPES.get(one.type.multiArrayType.dataType, "other")
            for one in (*model.description.input, *model.description.output)
        },
        operators=tuple(one.type for one in operations if one.type != "const"),
        constants=tuple(constants.found.values()),
        steps=constants.steps,
    )


def _axes(kind: Any) -> tuple[tuple[int, int], ...]:
    if kind.WhichOneof("ShapeFlexibility") == "shapeRange":
        return tuple((axis.lowerBound, axis.upperBound) for axis in kind.shapeRange.sizeRanges)
    return tuple((axis, axis) for axis in kind.shape)


def _lengths(kind: Any) -> tuple[int | None, ...]:
    known = (axis.WhichOneof("dimension") == "constant" for axis in kind.dimensions)
    return tuple(axis.constant.size if fixed else None for axis, fixed in zip(kind.dimensions, known, strict=True))


@dataclass
class _Constants:
    """Those in the file of weights, each once: of constants, and of what is made of integers when it is loaded."""

    weights: bytes
    file: Path
    where: Path
    type_name: Callable[[int], str]
    found: dict[int, StoredTensor] = field(default_factory=dict)
    steps: dict[str, np.ndarray] = field(default_factory=dict)

    def read(self, operation: Any) -> None:
        name = operation.outputs[0].name if operation.outputs else operation.type
        if operation.type == "const":
            self.add(name, operation.attributes["val"])
        elif operation.type.startswith("constexpr_"):
            given = {key: bound.arguments[0].value for key, bound in operation.inputs.items() if bound.arguments}
            if "data" in given:
                self.add(name, given.pop("data"))
            scales = {key: self.add(f"{name}.{key}", value, scales=True) for key, value in given.items()}
            if "scale" in given:
                kept = scales["scale"]
                step = _immediate(given["scale"]) if kept is None else kept.values(self.weights)
                self.steps[name] = step.astype(np.float32)

    def add(self, name: str, value: Any, scales: bool = False) -> StoredTensor | None:
        """A constant that lies in the file of weights; None for one that lies in the program itself."""
        if not value.HasField("blobFileValue"):
            return None
        kind, offset = value.type.tensorType, value.blobFileValue.offset
        start, size = self.span(offset, name)
        shape, mil = tuple(axis.constant.size for axis in kind.dimensions), self.type_name(kind.dataType)
        dtype = _NUMPY.get(mil, mil.lower())
        if mil in _NUMPY and size != math.prod(shape) * np.dtype(dtype).itemsize:
            what = f"The constant {name!r} has {size} bytes, which {mil} {list(shape)} does not take."
            raise unreadable_file_error(what, self.where, "coreml")
        role = "constant" if dtype in _INDICES and not scales else infer_role(dtype, shape, scales)
        half = {"packed": True, "decode": partial(_of_four_bits, shape)} if dtype == "int4" else {}
        return self.found.setdefault(offset, stored(name, dtype, shape, self.file, (start, size), role, **half))

    def span(self, offset: int, name: str) -> tuple[int, int]:
        """First byte and number of bytes of a constant by the header that stands at ``offset``."""
        if offset + _BLOB.size <= len(self.weights):
            mark, _, size, start = _BLOB.unpack_from(self.weights, offset)
            if mark == _MARK and start + size <= len(self.weights):
                return start, size
        raise unreadable_file_error(
            f"The constant {name!r} is not whole in the {len(self.weights)} bytes of weights.", self.where, "coreml"
        )


def _of_four_bits(shape: tuple[int, ...], data: np.ndarray) -> np.ndarray:
    """Signed integers, two in a byte, of which the lower half comes first."""
    halves = np.stack([data & 15, data >> 4], axis=-1).reshape(-1)[: math.prod(shape)]
    return (halves.astype(np.int8) ^ 8).reshape(shape) - np.int8(8)


def _immediate(value: Any) -> np.ndarray:
    """A small constant, which lies in the program itself."""
    tensor = value.immediateValue.tensor
    shape = [axis.constant.size for axis in value.type.tensorType.dimensions]
    if tensor.WhichOneof("value") == "bytes":
        return np.frombuffer(tensor.bytes.values, np.float16).astype(np.float32).reshape(shape)
    return np.asarray(tensor.floats.values, np.float32).reshape(shape)
