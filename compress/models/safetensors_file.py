"""Safetensors files: tensor metadata from headers, without torch or weights, and single tensors."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.models.stored_tensor import INDEX_TYPES, Role, StoredTensor, stored
from compress.utils.errors import ModelError
from compress.utils.read_limits import LIMITS, refuse_above

if TYPE_CHECKING:
    import torch

_TYPES: dict[str, tuple[str, int]] = {
    **{f"F{bits}": (f"float{bits}", bits) for bits in (16, 32, 64)},
    **{f"I{bits}": (f"int{bits}", bits) for bits in (8, 16, 32, 64)},
    **{f"U{bits}": (f"uint{bits}", bits) for bits in (8, 16, 32, 64)},
    "BF16": ("bfloat16", 16),
    "F8_E4M3": ("float8_e4m3fn", 8),
    "F8_E5M2": ("float8_e5m2", 8),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 8),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 8),
    "F8_E8M0": ("float8_e8m0fnu", 8),
    "F6_E2M3": ("float6_e2m3fn", 6),
    "F6_E3M2": ("float6_e3m2fn", 6),
    "F4": ("float4_e2m1fn", 4),
    "C64": ("complex64", 64),
    "BOOL": ("bool", 8),
}


def read_header(path: Path) -> tuple[StoredTensor, ...]:
    """Return every tensor in the order of its bytes, which are contiguous. Raises `ModelError` for a damaged file."""
    size = path.stat().st_size
    with path.open("rb") as head:
        length = int.from_bytes(head.read(8), "little")
    # A length beyond the end of the file is left to the library.
    refuse_above(LIMITS.safetensors_header_bytes, min(length, size), "The header", "bytes", path)
    with _opened(path, "numpy") as file:
        refuse_above(LIMITS.tensors, len(file.keys()), path.name, "tensors", path)
        entries = [(name, file.get_slice(name)) for name in file.offset_keys()]
        layouts = [(name, entry.get_dtype(), tuple(entry.get_shape())) for name, entry in entries]
    sizes = [math.prod(shape) * _TYPES[kind][1] // 8 for _, kind, shape in layouts]
    # The library does not expose offsets: the data are the last bytes of the file, without gaps.
    start, tensors = size - sum(sizes), []
    for (name, kind, shape), length in zip(layouts, sizes, strict=True):
        dtype = _TYPES[kind][0]
        # Other formats store scalars as constants; in a checkpoint a scalar is a parameter.
        role: Role = "constant" if dtype in INDEX_TYPES else "weight"
        tensors.append(stored(name, dtype, shape, path, (start, length), role))
        start += length
    return tuple(tensors)


def read_tensor(path: Path, name: str) -> torch.Tensor:
    """Return one tensor, memory-mapped from its file."""
    with _opened(path, "pt") as file:
        tensor: torch.Tensor = file.get_tensor(name)
        return tensor


def read_metadata(path: Path) -> dict[str, str]:
    """Return the metadata strings of a file."""
    with _opened(path, "pt") as file:
        metadata: dict[str, str] = file.metadata() or {}
        return metadata


@contextmanager
def _opened(path: Path, framework: str) -> Iterator[Any]:
    """Open a file. Raises `ModelError` if it is broken, or lacks a tensor that is read from it."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework=framework) as file:
            yield file
    except SafetensorError as error:
        raise ModelError(
            f"The safetensors file of {path.stat().st_size} bytes is truncated or broken: {error}.",
            where=str(path),
            expected="a whole file, as safetensors' save_file writes it",
            hint="Fetch or copy the file again; its download or copy may have stopped early.",
        ) from error


def write_whole(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file that gets its name only after all of it is on disk."""
    from safetensors.torch import save_file

    partial = path.with_suffix(".partial")
    save_file(dict(tensors), partial, metadata=metadata)
    with partial.open("rb") as file:
        # Without this, a crash could leave a complete name with incomplete content.
        os.fsync(file.fileno())
    partial.replace(path)


IMATRIX = "imatrix.safetensors"
"""File of float32 [columns] tensors by module names, with the meaning that llama.cpp's imatrix has."""


def read_imatrix(folder: Path) -> Mapping[str, torch.Tensor]:
    """Return the importance matrix in a checkpoint's folder; empty if there is none."""
    file = folder / IMATRIX
    return {tensor.name: read_tensor(file, tensor.name) for tensor in read_header(file)} if file.is_file() else {}
