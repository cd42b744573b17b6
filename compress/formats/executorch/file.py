"""What a `.pte` file holds: constants of the program and of its XNNPACK parts, by the package's own schema."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.errors import MissingExtraError, ModelError
from compress.formats.executorch.quiet import quiet_executorch
from compress.formats.executorch.xnnpack_graph import XnnConstant, read_xnnpack

_HEADER = 40
_NUMPY = {
    "BYTE": "uint8", "CHAR": "int8", "SHORT": "int16", "INT": "int32", "LONG": "int64", "HALF": "float16",
    "FLOAT": "float32", "DOUBLE": "float64", "BOOL": "bool",
}  # fmt: skip
_TABLES = {"embedding_2bit": 4, "embedding_4bit": 2, "embedding_byte": 1}
"""Operators that look rows of quantized tables up, and how many weights lie in a byte of theirs."""


@dataclass(frozen=True)
class PteConstant:
    """A stored constant: its place in the file, numpy's type, and how many weights it holds.

    ``scale``: it belongs to integers as their scale or zero point.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    bytes: int
    weights: int
    scale: bool = False


def check_whole(content: bytes, where: str) -> tuple[int, int]:
    """Bytes of the program itself, and where its segments begin. Raises `ModelError` for a file that was cut."""
    if content[4:6] != b"ET":
        raise ModelError("The file is no ExecuTorch program.", where=where, expected="the letters ET at byte 4")
    if content[8:12] != b"eh00":
        return len(content), len(content)
    program, base, segments = (int.from_bytes(content[at : at + 8], "little") for at in (16, 24, 32))
    end = max(program, base + segments)
    if len(content) < max(end, _HEADER):
        raise ModelError(
            f"The program ends at byte {len(content)} of {end}.",
            where=where,
            mend="copy the folder again with all of its files",
        )
    return program, base


def read_pte(content: bytes, where: Path) -> tuple[PteConstant, ...]:
    """Every constant of a program. Raises `ModelError` for a broken file, `MissingExtraError` without executorch."""
    size, base = check_whole(content, str(where))
    try:
        with quiet_executorch():
            from executorch.exir._serialize._flatbuffer_program import _flatbuffer_to_program

            program = _flatbuffer_to_program(content[:size])
    except ImportError as error:
        raise MissingExtraError("executorch", "executorch", "Looking into a .pte file") from error
    except (ValueError, TypeError, IndexError, KeyError, AttributeError, RuntimeError, UnicodeError) as error:
        raise _broken(where, error) from error
    try:
        found = (*_own(program, base), *_delegated(program, base, content))
    except (ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
        raise _broken(where, error) from error
    for one in found:
        if one.start < 0 or one.start + one.bytes > len(content):
            raise ModelError(
                f"The constant {one.name!r} ends at byte {one.start + one.bytes} of {len(content)}.",
                where=str(where),
                mend="copy the folder again with all of its files",
            )
    return found


def _broken(where: Path, error: Exception) -> ModelError:
    return ModelError(
        f"The program cannot be read: {error or type(error).__name__}",
        where=str(where),
        mend="write it again with the stage executorch, or copy the folder again with all of its files",
    )


def _own(program: Any, base: int) -> Iterator[PteConstant]:
    """Tensors that ExecuTorch's own kernels read; a buffer that several of them share counts once."""
    segment, _ = _segment(program, program.constant_segment.segment_index, base)
    offsets = program.constant_segment.offsets
    known: set[int] = set()
    for plan in program.execution_plan:
        tables = dict(_tables(plan))
        for place, value in enumerate(plan.values):
            tensor = value.val
            buffer = getattr(tensor, "data_buffer_idx", 0)
            if not buffer or tensor.allocation_info is not None or buffer in known:
                continue
            known.add(buffer)
            dtype, shape = _NUMPY.get(tensor.scalar_type.name, tensor.scalar_type.name), tuple(tensor.sizes)
            role, packed = tables.get(place, ("", 1))
            weighs = role == "table" or (role != "scale" and dtype.startswith("float") and bool(shape))
            elements = math.prod(shape)
            yield PteConstant(
                name=f"constant.{buffer}",
                dtype=dtype,
                shape=shape,
                start=segment + offsets[buffer],
                bytes=elements * _bytes_of(dtype),
                weights=elements * packed if weighs else 0,
                scale=role == "scale",
            )


def _tables(plan: Any) -> Iterator[tuple[int, tuple[str, int]]]:
    """Values that are quantized tables, and how many weights they have in a byte, or their scales and zero points."""
    for chain in plan.chains:
        for instruction in chain.instructions:
            call = instruction.instr_args
            index = getattr(call, "op_index", None)
            kind = "" if index is None else plan.operators[index].name.rpartition("::")[2]
            if kind in _TABLES:
                table, *scales = call.args[:3]
                yield table, ("table", _TABLES[kind])
                yield from ((place, ("scale", 1)) for place in scales)


def _delegated(program: Any, base: int, content: bytes) -> Iterator[PteConstant]:
    """What XNNPACK's parts are given, by their own description; equal constants of several parts are one."""
    named = {one.key: _segment(program, one.segment_index, base) for one in program.named_data or ()}
    seen: set[str] = set()
    for plan in program.execution_plan:
        for place, delegate in enumerate(plan.delegates):
            if delegate.id != "XnnpackBackend":
                continue
            start, size = _payload(program, delegate, base)
            for constant in read_xnnpack(content[start : start + size]):
                if constant.key in named and constant.key not in seen:
                    seen.add(constant.key)
                    yield _named(constant, f"xnnpack.{place}.{constant.value}", *named[constant.key])


def _named(constant: XnnConstant, name: str, start: int, size: int) -> PteConstant:
    if constant.scale:
        return PteConstant(name, constant.dtype, (size // _bytes_of(constant.dtype),), start, size, 0, scale=True)
    return PteConstant(name, constant.dtype, constant.shape, start, size, math.prod(constant.shape))


def _payload(program: Any, delegate: Any, base: int) -> tuple[int, int]:
    if delegate.processed.location.name != "SEGMENT":
        raise ValueError("a part of XNNPACK lies within the program")
    return _segment(program, delegate.processed.index, base)


def _segment(program: Any, index: int, base: int) -> tuple[int, int]:
    if not program.segments:
        return base, 0
    found = program.segments[index]
    return base + found.offset, found.size


def _bytes_of(dtype: str) -> int:
    import numpy as np

    return np.dtype(dtype).itemsize
