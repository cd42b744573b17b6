"""Safetensors files by their header alone: names, types, shapes and places, without torch or weights.

Format: 8 bytes little-endian header length, a JSON header, then the tensors' bytes without gaps.
"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.checkpoints.stored_tensor import StoredTensor, role_of, stored
from compress.errors import ModelError

if TYPE_CHECKING:
    import torch

MAX_HEADER_BYTES = 100_000_000
"""The limit of the reference implementation."""

_TYPES: dict[str, tuple[str, int]] = {
    "F64": ("float64", 64),
    "F32": ("float32", 32),
    "F16": ("float16", 16),
    "BF16": ("bfloat16", 16),
    "F8_E4M3": ("float8_e4m3fn", 8),
    "F8_E5M2": ("float8_e5m2", 8),
    "F8_E8M0": ("float8_e8m0fnu", 8),
    "F6_E2M3": ("float6_e2m3fn", 6),
    "F6_E3M2": ("float6_e3m2fn", 6),
    "F4": ("float4_e2m1fn", 4),
    "C64": ("complex64", 64),
    "I64": ("int64", 64),
    "I32": ("int32", 32),
    "I16": ("int16", 16),
    "I8": ("int8", 8),
    "U64": ("uint64", 64),
    "U32": ("uint32", 32),
    "U16": ("uint16", 16),
    "U8": ("uint8", 8),
    "BOOL": ("bool", 8),
}


def read_header(path: Path) -> tuple[StoredTensor, ...]:
    """Every tensor in the order of its bytes. Raises `ModelError` for a truncated or broken file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise _truncated(path, f"{size} bytes", "at least the 8 bytes of the header's length")
        (length,) = struct.unpack("<Q", prefix)
        if length > MAX_HEADER_BYTES:
            raise _broken(path, f"its header claims {length} bytes")
        if 8 + length > size:
            raise _truncated(path, f"{size} bytes", f"{8 + length} bytes for the header alone")
        header = _parse(path, file.read(length))
    tensors = [_tensor(path, name, entry, 8 + length) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.bytes))
    _check_layout(path, tensors, 8 + length, size)
    return tuple(tensors)


def read_tensor(path: Path, name: str) -> torch.Tensor:
    """One tensor, mapped from its file: read as it is used."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        tensor: torch.Tensor = file.get_tensor(name)
        return tensor


def read_metadata(path: Path) -> dict[str, str]:
    """What a file says of itself."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        found: dict[str, str] = file.metadata()
        return found


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _broken(path, f"its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise _broken(path, "its header is not a JSON object")
    header.pop("__metadata__", None)
    return header


def _tensor(path: Path, name: str, entry: Any, data_start: int) -> StoredTensor:
    try:
        dtype, bits = _TYPES[entry["dtype"]]
        shape = tuple(int(size) for size in entry["shape"])
        begin, end = (int(offset) for offset in entry["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise _broken(path, f"the entry of {name!r} is {entry!r}") from error
    if min((begin, end - begin, *shape)) < 0 or math.prod(shape) * bits != (end - begin) * 8:
        raise _broken(path, f"{name!r} of type {entry['dtype']} and shape {list(shape)} takes {end - begin} bytes")
    role = role_of(dtype, shape or (1,))
    return stored(name, dtype, shape, path, (data_start + begin, end - begin), role)


def _check_layout(path: Path, tensors: list[StoredTensor], data_start: int, size: int) -> None:
    position = data_start
    for tensor in tensors:
        if tensor.start != position:
            raise _broken(path, f"there is a gap or an overlap before {tensor.name!r}")
        position += tensor.bytes
    if position > size:
        raise _truncated(path, f"{size} bytes", f"{position} bytes by its header")
    if position < size:
        raise _broken(path, f"{size - position} bytes follow the last tensor")


def _truncated(path: Path, found: str, expected: str) -> ModelError:
    return ModelError(
        f"The safetensors file is truncated: it has {found}.",
        where=str(path),
        expected=expected,
        mend="Fetch or copy the file again; its download or copy stopped early.",
    )


def _broken(path: Path, reason: str) -> ModelError:
    return ModelError(
        f"Not a valid safetensors file: {reason}.",
        where=str(path),
        expected="a file as safetensors' save_file writes it",
        mend="Fetch or copy the file again, or save it again with safetensors.",
    )
