"""Core ML package as a folder, and reader of the constants of its program (MIL).

Importing this imports no coremltools.
"""

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
from typing import TYPE_CHECKING, Any

from compress.formats.model_file import FileModel
from compress.formats.quiet_output import suppress_output
from compress.models.stored_tensor import StoredTensor, infer_role, stored
from compress.utils.errors import MissingExtraError, incomplete_artifact_error, unreadable_file_error

# Recipes load this module, and `compress recipes` must not wait for NumPy.
if TYPE_CHECKING:
    import numpy as np


PACKAGE = "model.mlpackage"
"""Name of the package, a folder that Finder and Xcode show as one file."""
_AUTHOR = "com.apple.CoreML"
_SPECIFICATION = f"{_AUTHOR}/model.mlmodel"
_WEIGHTS = f"{_AUTHOR}/weights"
_NAMES = uuid.uuid5(uuid.NAMESPACE_DNS, _AUTHOR)

_BLOB = struct.Struct("<IIQQ")
"""Header of each constant in the weights file: marker, type, number of bytes and offset."""
_MARK = 0xDEADBEEF
_NUMPY = {
    "FLOAT16": "float16", "FLOAT32": "float32", "FLOAT64": "float64", "BOOL": "bool", "INT8": "int8", "INT16": "int16",
    "INT32": "int32", "INT64": "int64", "UINT8": "uint8", "UINT16": "uint16", "UINT32": "uint32", "UINT64": "uint64",
}  # fmt: skip

ARRAY_TYPES = {65552: "float16", 65568: "float32", 65600: "float64", 131104: "int32"}
"""numpy types by Core ML's numbers for array elements (`ArrayFeatureType.ArrayDataType`)."""

_INDICES = ("int16", "uint16")
"""Types of lookup indices in small tables; Core ML stores no wider integers in its weights file."""


class CoreMlModel(FileModel):
    """Package with Core ML's specification, its weights and the manifest."""

    kind = "coreml"

    @classmethod
    def files_with(cls, file: Path) -> tuple[Path, ...]:
        """See `FileModel.files_with`."""
        weights_of(specification_of(file))
        return tuple(sorted(path for path in file.rglob("*") if path.is_file()))

    @property
    def specification(self) -> bytes:
        """Content of the specification file (a protobuf message)."""
        return self.own[f"{PACKAGE}/Data/{_SPECIFICATION}"]

    @property
    def weights(self) -> bytes:
        """Content of the weights file."""
        return self.own[f"{PACKAGE}/Data/{_WEIGHTS}/weight.bin"]


def package_files(specification: bytes, weights: bytes) -> dict[str, bytes]:
    """Return the files of a package with content-based ids, because coremltools generates random ids each time."""
    # Ids follow from the content, so that equal models give equal packages.
    root = _item_id(specification)
    items = {
        _item_id(weights, b"weights"): {"description": "CoreML Model Weights", "name": "weights", "path": _WEIGHTS},
        root: {"description": "CoreML Model Specification", "name": "model.mlmodel", "path": _SPECIFICATION},
    }
    manifest = {
        "fileFormatVersion": "1.0.0",
        "itemInfoEntries": {name: {"author": _AUTHOR, **item} for name, item in items.items()},
        "rootModelIdentifier": root,
    }
    return {
        f"{PACKAGE}/Data/{_SPECIFICATION}": specification,
        f"{PACKAGE}/Data/{_WEIGHTS}/weight.bin": weights,
        # This layout matches Core ML's own library, which rewrites the manifest whenever it opens a package.
        f"{PACKAGE}/Manifest.json": (json.dumps(manifest, indent=4, sort_keys=True) + "\n").encode(),
    }


def _item_id(content: bytes, kind: bytes = b"model") -> str:
    return str(uuid.uuid5(_NAMES, hashlib.sha256(kind + content).hexdigest()))


def specification_of(package: Path) -> Path:
    """Return the path of the specification in a package; raise `ModelError` if it is missing."""
    return _require_file(package / "Data" / _SPECIFICATION, package)


def weights_of(specification: Path) -> Path:
    """Return the path of the weights beside a specification; raise `ModelError` if they are missing."""
    return _require_file(specification.parent / "weights" / "weight.bin", specification.parent)


def _require_file(file: Path, package: Path) -> Path:
    if not file.is_file():
        within = f"{file.relative_to(package).as_posix()} within it"
        raise incomplete_artifact_error(f"The package lacks {file.name}.", package, within)
    return file


@dataclass(frozen=True)
class MilProgram:
    """Contents of a Core ML program.

    Attributes:
        version: Specification version.
        inputs: Lowest and highest length of each axis, by input name.
        outputs: Length of each axis by output name; None for a variable axis.
        types: numpy types of inputs and outputs.
        operators: Types of the operators, in order.
        constants: Constants in the weights file, with a numpy type or `int4`.
        steps: Quantization steps of integer constants, float32 with as many axes as the constant.
    """

    version: int
    inputs: dict[str, tuple[tuple[int, int], ...]]
    outputs: dict[str, tuple[int | None, ...]]
    types: dict[str, str]
    operators: tuple[str, ...]
    constants: tuple[StoredTensor, ...]
    steps: dict[str, np.ndarray]


def read_tensors(file: Path, root: Path) -> list[StoredTensor]:
    """Return the constants in the weights file of a specification."""
    weights = weights_of(file)
    return list(read_coreml(file.read_bytes(), weights.read_bytes(), file, weights).constants)


def read_coreml(specification: bytes, weights: bytes, where: Path, weights_file: Path = Path()) -> MilProgram:
    """Parse a program.

    Args:
        specification: Content of the specification file.
        weights: Content of the weights file.
        where: Path for error messages.
        weights_file: Path that the returned constants refer to.

    Raises:
        ModelError: The package is invalid.
        MissingExtraError: coremltools is not installed.
    """
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
    function, features = model.mlProgram.functions["main"], model.description
    # The main function may have a block for each opset version; their operators are listed together.
    operations = [operation for block in function.block_specializations.values() for operation in block.operations]
    lengths = {
        value.name: tuple(
            axis.constant.size if axis.WhichOneof("dimension") == "constant" else None
            for axis in value.type.tensorType.dimensions
        )
        for operation in operations
        for value in operation.outputs
    }
    reader = _ConstantReader(weights, weights_file, where, MIL_pb2.DataType.Name)
    for operation in operations:
        reader.read(operation)
    arrays = {feature.name: feature.type.multiArrayType for feature in (*features.input, *features.output)}
    return MilProgram(
        version=model.specificationVersion,
        inputs={feature.name: _axes(arrays[feature.name]) for feature in features.input},
        outputs={feature.name: lengths.get(feature.name, ()) for feature in features.output},
        types={name: ARRAY_TYPES.get(array.dataType, "other") for name, array in arrays.items()},
        operators=tuple(operation.type for operation in operations if operation.type != "const"),
        constants=tuple(reader.constants.values()),
        steps=reader.steps,
    )


def _axes(array_type: Any) -> tuple[tuple[int, int], ...]:
    if array_type.WhichOneof("ShapeFlexibility") == "shapeRange":
        return tuple((axis.lowerBound, axis.upperBound) for axis in array_type.shapeRange.sizeRanges)
    return tuple((axis, axis) for axis in array_type.shape)


@dataclass
class _ConstantReader:
    """Collector of the constants in the weights file, each once, including those dequantized at load time."""

    weights: bytes
    file: Path
    where: Path
    type_name: Callable[[int], str]
    constants: dict[int, StoredTensor] = field(default_factory=dict)
    steps: dict[str, np.ndarray] = field(default_factory=dict)

    def read(self, operation: Any) -> None:
        import numpy as np

        name = operation.outputs[0].name if operation.outputs else operation.type
        if operation.type == "const":
            self.add(name, operation.attributes["val"])
        # `constexpr_` operators dequantize a constant when the program is loaded.
        elif operation.type.startswith("constexpr_"):
            arguments = {key: bound.arguments[0].value for key, bound in operation.inputs.items() if bound.arguments}
            if "data" in arguments:
                self.add(name, arguments.pop("data"))
            scales = {key: self.add(f"{name}.{key}", value, scales=True) for key, value in arguments.items()}
            if "scale" in arguments:
                scale = scales["scale"]
                step = _immediate(arguments["scale"]) if scale is None else scale.values(self.weights)
                self.steps[name] = step.astype(np.float32)

    def add(self, name: str, value: Any, scales: bool = False) -> StoredTensor | None:
        """Return a constant of the weights file, or None for a constant that the program itself contains."""
        import numpy as np

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
        packing = {"packed": True, "decode": partial(_unpack_int4, shape)} if dtype == "int4" else {}
        return self.constants.setdefault(offset, stored(name, dtype, shape, self.file, (start, size), role, **packing))

    def span(self, offset: int, name: str) -> tuple[int, int]:
        """Return the first byte and the number of bytes of a constant from the header at ``offset``."""
        if offset + _BLOB.size <= len(self.weights):
            mark, _, size, start = _BLOB.unpack_from(self.weights, offset)
            if mark == _MARK and start + size <= len(self.weights):
                return start, size
        raise unreadable_file_error(
            f"The constant {name!r} is not whole in the {len(self.weights)} bytes of weights.", self.where, "coreml"
        )


def _unpack_int4(shape: tuple[int, ...], data: np.ndarray) -> np.ndarray:
    """Return signed 4-bit integers, two per byte with the low half first."""
    import numpy as np

    nibbles = np.stack([data & 15, data >> 4], axis=-1).reshape(-1)[: math.prod(shape)]
    # Flipping bit 3 and subtracting 8 sign-extends a 4-bit number.
    return (nibbles.astype(np.int8) ^ 8).reshape(shape) - np.int8(8)


def _immediate(value: Any) -> np.ndarray:
    """Return a small constant that the program itself contains."""
    import numpy as np

    tensor = value.immediateValue.tensor
    shape = [axis.constant.size for axis in value.type.tensorType.dimensions]
    if tensor.WhichOneof("value") == "bytes":
        return np.frombuffer(tensor.bytes.values, np.float16).astype(np.float32).reshape(shape)
    return np.asarray(tensor.floats.values, np.float32).reshape(shape)
