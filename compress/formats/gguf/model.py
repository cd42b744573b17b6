"""Folder of a GGUF file with its tokenizer and config, and reader of its header. Importing this imports no gguf.

Format: "GGUF", version, counts, key-value pairs, tensor entries, then the aligned data (ggml/docs/gguf.md).
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from compress.models.model import link_or_copy, only_file
from compress.models.stored_tensor import StoredTensor, stored
from compress.utils.errors import ModelError
from compress.utils.read_limits import LIMITS, refuse_above

# Recipes load this module, and `compress recipes` must not wait for NumPy.
if TYPE_CHECKING:
    import numpy as np


GGUF_FILE = "model.gguf"

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_UINT32, _STRING, _ARRAY = 4, 8, 9
_ALIGNMENT = "general.alignment"
_DEFAULT_ALIGNMENT = 32
_MAX_DIMENSIONS = 4  # GGML_MAX_DIMS
_PLAIN = {
    "F16": "float16", "F32": "float32", "F64": "float64", "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64",
}  # fmt: skip


@dataclass(frozen=True)
class GgufModel:
    """Folder that llama.cpp runs; config and tokenizer files are for evaluation, in Hugging Face layout."""

    kind: ClassVar[str] = "gguf"
    folder: Path

    @property
    def file(self) -> Path:
        """Return the GGUF file; raise `ModelError` if there is not exactly one."""
        return find_gguf(self.folder)

    @classmethod
    def load(cls, directory: Path, task: object) -> Self:
        """Open a saved folder; raise `ModelError` if it does not contain one complete GGUF file."""
        # The header shows whether the file is complete.
        read_gguf(find_gguf(directory))
        return cls(directory)

    def save(self, directory: Path) -> None:
        """Put every file into ``directory``, as a hard link where the file system supports it, else as a copy."""
        for path in sorted(path for path in self.folder.iterdir() if path.is_file()):
            link_or_copy(path, directory / path.name)


def find_gguf(artifact: Path) -> Path:
    """Return the only `.gguf` file at or below ``artifact``; raise `ModelError` if there is not exactly one."""
    return only_file(artifact, ".gguf", "gguf")


@dataclass(frozen=True)
class GgufHeader:
    """Metadata and tensors of a file, with shapes in torch's order. Of an array only the length is stored."""

    metadata: dict[str, Any]
    tensors: tuple[StoredTensor, ...]


def read_gguf(path: Path) -> GgufHeader:
    """Return the header of a file; raise `ModelError` for a truncated or broken file."""
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise _broken(path, "it does not begin with the letters GGUF")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                header = _Cursor(path, data, 4).header()
            except (struct.error, IndexError) as error:
                raise _truncated(path, f"{len(data)} bytes, less than its header") from error
            except (UnicodeDecodeError, KeyError, OverflowError, ValueError) as error:
                raise _broken(path, f"its header cannot be read ({error})") from error
            # A truncated file ends before the last tensor.
            needed = max((tensor.start + tensor.bytes for tensor in header.tensors), default=0)
            if needed > len(data):
                raise _truncated(path, f"{len(data)} bytes, where its header speaks of {needed}")
    return header


def read_tensors(file: Path, root: Path) -> list[StoredTensor]:
    """Return the tensors of a file."""
    return list(read_gguf(file).tensors)


@dataclass
class _Cursor:
    path: Path
    data: mmap.mmap
    position: int
    entries: int = 0

    def header(self) -> GgufHeader:
        path = self.path
        version = self.scalar("I")
        if version not in (2, 3):
            raise _broken(path, f"its version is {version}; little-endian versions 2 and 3 are known")
        count, pairs = self.scalar("Q"), self.scalar("Q")
        refuse_above(LIMITS.tensors, count, path.name, "tensors", path)
        self.count_entries(pairs)
        metadata: dict[str, Any] = {}
        for _ in range(pairs):
            name, kind = self.string(), self.scalar("I")
            if name in metadata or (name == _ALIGNMENT and kind != _UINT32):
                raise _broken(path, f"the key {name!r} occurs twice or has an unexpected type")
            metadata[name] = self.value(kind)
        entries = [self.entry() for _ in range(count)]
        if len({entry[0] for entry in entries}) < len(entries):
            raise _broken(path, "two tensors have one name")
        alignment = metadata.get(_ALIGNMENT, _DEFAULT_ALIGNMENT)
        if alignment.bit_count() != 1:
            raise _broken(path, f"its alignment is {alignment}, no power of two")
        # Tensor data begins at the next multiple of the alignment.
        begin = math.ceil(self.position / alignment) * alignment
        return GgufHeader(metadata, tuple(_tensor(path, begin, *entry) for entry in entries))

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.position)
        self.position += struct.calcsize("<" + code)
        return value

    def string(self) -> str:
        length = self.scalar("Q")
        if self.position + length > len(self.data):
            raise IndexError
        self.position += length
        return self.data[self.position - length : self.position].decode()

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.scalar(_SCALARS[kind])
        if depth == LIMITS.array_depth:
            raise ValueError(f"arrays nested more than {LIMITS.array_depth} deep")
        # Skip the entries of an array, of which only the length is returned.
        kind, length = self.scalar("I"), int(self.scalar("Q"))
        if kind in _SCALARS:
            self.position += length * struct.calcsize("<" + _SCALARS[kind])
        else:
            self.count_entries(length)
            for _ in range(length):
                self.value(kind, depth + 1)
        return length

    def count_entries(self, number: int) -> None:
        self.entries += number
        refuse_above(LIMITS.metadata_entries, self.entries, "The header", "metadata entries", self.path)

    def entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name, dimensions = self.string(), self.scalar("I")
        if dimensions > _MAX_DIMENSIONS:
            raise ValueError(f"the tensor {name!r} has {dimensions} dimensions, more than {_MAX_DIMENSIONS}")
        return name, tuple(self.scalar("Q") for _ in range(dimensions))[::-1], self.scalar("I"), self.scalar("Q")


def _tensor(path: Path, begin: int, name: str, shape: tuple[int, ...], kind: int, offset: int) -> StoredTensor:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        ggml = GGMLQuantizationType(kind)
    except ValueError as error:
        raise _broken(path, f"the tensor {name!r} has the unknown type {kind}") from error
    block, block_bytes = GGML_QUANT_SIZES[ggml]
    if (shape[-1] if shape else 1) % block:
        raise _broken(path, f"the rows of the tensor {name!r} are no multiple of {block}, the block of {ggml.name}")
    size = math.prod(shape) // block * block_bytes
    return stored(name, ggml.name, shape, path, (begin + offset, size), decode=partial(_dequantized, ggml.name, shape))


def _dequantized(kind: str, shape: tuple[int, ...], data: np.ndarray) -> np.ndarray:
    """Return the values of a ggml type, with quantized ones as float32."""

    import numpy as np
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    if kind in _PLAIN:
        return data.view(_PLAIN[kind]).reshape(shape)
    if not data.size:
        return np.empty(shape, np.float32)
    values: np.ndarray = dequantize(data.reshape(*shape[:-1], -1), GGMLQuantizationType[kind])
    return values


def _truncated(path: Path, description: str) -> ModelError:
    return ModelError(
        f"The GGUF file is truncated: it has {description}.",
        where=str(path),
        hint="Fetch or copy the file again; its download or copy stopped early.",
    )


def _broken(path: Path, reason: str) -> ModelError:
    return ModelError(f"Not a valid GGUF file: {reason}.", where=str(path), hint="Fetch the file again.")
