"""Constants of one part of a program that XNNPACK runs, by the schema `fb_xnnpack` of ExecuTorch (`schema.fbs`).

The package has that schema for its compiler only; the few fields that say what a constant is are read here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_MAGIC = b"XH00"
_TYPES = {
    1: "float32", 2: "float16", 3: "int8", 4: "uint8", 5: "int32", 6: "int8", 7: "int32", 8: "int4", 9: "int8",
    10: "int4", 12: "int32", 15: "bfloat16",
}  # fmt: skip
"""`XNNDatatype`: the same for all channels, one scale a channel, or one a block."""
_QUANTIZED = 2
_SCALES_AT = {1: 8, 4: 12}
"""`XNNQuantParams` that keep their scales among the constants (a scale a channel, one a block), and in which field."""


@dataclass(frozen=True)
class XnnConstant:
    """``key`` finds its bytes among the program's named data; ``value`` is its place among the graph's values."""

    key: str
    value: str
    dtype: str
    shape: tuple[int, ...]
    scale: bool = False


def read_xnnpack(payload: bytes) -> Iterator[XnnConstant]:
    """Weights, and the scales that belong to them. Raises `ValueError` for something else, and flatbuffers' errors."""
    from flatbuffers import encode, packer
    from flatbuffers.table import Table

    if payload[4:8] != _MAGIC:
        raise ValueError("a part of XNNPACK has no header")
    start, size = (int.from_bytes(payload[at : at + 4], "little") for at in (10, 14))
    content = payload[start : start + size]
    graph = Table(content, encode.Get(packer.uoffset, content, 0))
    constants = [_text(one, 8) for one in _tables(graph, 20)]
    for place, value in enumerate(_tables(graph, 8)):
        held = _table(value, 6)
        tensor = _table(held, 4) if _number(value, 4, "uint8") == _QUANTIZED else held
        index = _number(tensor, 10, "uint32")
        if not index:
            continue
        yield XnnConstant(constants[index], f"{place}", _TYPES.get(_number(tensor, 4, "int16"), "?"), _shape(tensor))
        kind = _number(held, 6, "uint8") if tensor is not held else 0
        scales = _number(_table(held, 8), _SCALES_AT[kind], "uint32") if kind in _SCALES_AT else 0
        if scales:
            yield XnnConstant(constants[scales], f"{place}.scale", "float32", (), scale=True)


def _tables(table: Any, field: int) -> Iterator[Any]:
    from flatbuffers.table import Table

    at = table.Offset(field)
    if at:
        first = table.Vector(at)
        for index in range(table.VectorLen(at)):
            yield Table(table.Bytes, table.Indirect(first + 4 * index))


def _table(table: Any, field: int) -> Any:
    from flatbuffers.table import Table

    at = table.Offset(field)
    if not at:
        raise ValueError("a value of XNNPACK lacks its description")
    return Table(table.Bytes, table.Indirect(at + table.Pos))


def _number(table: Any, field: int, kind: str) -> int:
    from flatbuffers import number_types

    flags = {"uint8": number_types.Uint8Flags, "int16": number_types.Int16Flags, "uint32": number_types.Uint32Flags}
    at = table.Offset(field)
    return int(table.Get(flags[kind], at + table.Pos)) if at else 0


def _text(table: Any, field: int) -> str:
    at = table.Offset(field)
    return bytes(table.String(at + table.Pos)).decode() if at else ""


def _shape(tensor: Any) -> tuple[int, ...]:
    from flatbuffers import number_types

    at = tensor.Offset(8)
    if not at:
        return ()
    first = tensor.Vector(at)
    return tuple(int(tensor.Get(number_types.Uint32Flags, first + 4 * index)) for index in range(tensor.VectorLen(at)))
