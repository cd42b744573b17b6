"""Reading rows straight from the pages of an SQLite file, for one that SQLite itself won't open.

The format is that of https://www.sqlite.org/fileformat.html, sections 1.6 (pages of a table's tree) and 2.1 (records).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

Value = None | int | float | str
_TABLE_LEAF = 13
_FILE_HEADER_BYTES = 100
_USUAL_PAGE_BYTES = 4096
_INTEGERS = {1: 1, 2: 2, 3: 3, 4: 4, 5: 6, 6: 8}
"""Serial type -> bytes of the big-endian integer."""


class Row(NamedTuple):
    """A row as it is stored: an integer primary key is kept as the number and None among the values."""

    number: int
    values: tuple[Value, ...]


class _BrokenError(Exception):
    """What was read is no row."""


def stored_rows(content: bytes) -> Iterator[Row]:
    """Every row on every page that looks like a leaf of a table, of whichever table; broken ones are passed over."""
    size = _page_bytes(content)
    for start in range(0, len(content) - size + 1, size):
        header = start + (_FILE_HEADER_BYTES if start == 0 else 0)
        if content[header] != _TABLE_LEAF:
            continue
        count = struct.unpack_from(">H", content, header + 3)[0]
        for place in range(min(count, (start + size - header - 8) // 2)):
            offset = struct.unpack_from(">H", content, header + 8 + 2 * place)[0]
            try:
                yield _row(content, start, offset, size)
            except (_BrokenError, IndexError, struct.error, UnicodeDecodeError):
                continue


def _page_bytes(content: bytes) -> int:
    size = struct.unpack_from(">H", content, 16)[0] if len(content) >= _FILE_HEADER_BYTES else 0
    return 65536 if size == 1 else size if size >= 512 and size & (size - 1) == 0 else _USUAL_PAGE_BYTES


def _row(content: bytes, start: int, offset: int, size: int) -> Row:
    length, place = _varint(content, start + offset)
    number, place = _varint(content, place)
    return Row(number, tuple(_record(_payload(content, place, length, start + size, size))))


def _payload(content: bytes, place: int, length: int, end: int, size: int) -> bytes:
    """The record, of which a long one goes on in a chain of overflow pages."""
    if length > len(content):
        raise _BrokenError
    most = size - 35
    if length <= most:
        if place + length > end:
            raise _BrokenError
        return content[place : place + length]
    least = (size - 12) * 32 // 255 - 23
    here = least + (length - least) % (size - 4)
    here = here if here <= most else least
    parts = [content[place : place + here]]
    page = struct.unpack_from(">I", content, place + here)[0]
    left = length - here
    while left > 0:
        if page == 0:
            raise _BrokenError
        at = (page - 1) * size
        page = struct.unpack_from(">I", content, at)[0]
        parts.append(content[at + 4 : at + 4 + min(left, size - 4)])
        left -= size - 4
    return b"".join(parts)


def _record(record: bytes) -> Iterator[Value]:
    header_bytes, place = _varint(record, 0)
    kinds = []
    while place < header_bytes:
        kind, place = _varint(record, place)
        kinds.append(kind)
    for kind in kinds:
        value, place = _value(record, place, kind)
        yield value
    if place != len(record):
        raise _BrokenError


def _value(record: bytes, place: int, kind: int) -> tuple[Value, int]:
    if kind in (0, 8, 9):
        return {0: None, 8: 0, 9: 1}[kind], place
    if kind in _INTEGERS:
        end = place + _INTEGERS[kind]
        return int.from_bytes(record[place:end], "big", signed=True), end
    if kind == 7:
        return struct.unpack_from(">d", record, place)[0], place + 8
    if kind < 13 or kind % 2 == 0:
        raise _BrokenError
    end = place + (kind - 13) // 2
    return record[place:end].decode(), end


def _varint(content: bytes, place: int) -> tuple[int, int]:
    """A number of seven bits a byte, the highest first, and the place after it."""
    value = 0
    for count in range(8):
        byte = content[place + count]
        value = value << 7 | byte & 0x7F
        if byte < 0x80:
            return value, place + count + 1
    return value << 8 | content[place + 8], place + 9
