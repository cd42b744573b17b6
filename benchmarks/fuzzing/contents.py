"""Structure-aware mutations of binary files: fields, counts, offsets, lengths, chunks and messages.

Each format has a function that finds its fields or takes it apart. Everything else (flips, truncation, splicing) is
done on bytes.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import random
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

Mutator = Callable[[random.Random, bytes, Sequence[bytes]], bytes]
Field = tuple[int, int, str]
"""Offset, bytes and byte order of an integer."""

INTEGERS = (0, 1, 2, 3, 4, 7, 8, 9, 15, 16, 31, 32, 63, 127, 128, 255, 256, 1000, 32767, 32768, 65535, 65536, 10**6)
HUGE = (2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1)


def odd_integer(chance: random.Random, old: int, size: int) -> int:
    """Return another integer: a small, a huge, or one near the old one or the size of the file."""
    near = (old + 1, old - 1, old * 2, old // 2, old ^ (1 << chance.randrange(32)), -old, size, size - old, size + 1)
    return chance.choice((chance.choice(INTEGERS), chance.choice(HUGE), chance.choice(near), chance.choice(near)))


def mutate_bytes(chance: random.Random, content: bytes, others: Sequence[bytes]) -> bytes:
    """Flip, set, insert, remove, copy and splice bytes, or cut the end off."""
    data = bytearray(content)
    for _ in range(chance.choice((1, 1, 1, 2, 3, 8))):
        if not data:
            return bytes(chance.randrange(256) for _ in range(chance.randrange(20)))
        # The beginning of a file holds its header.
        at = min(chance.randrange(len(data)), chance.randrange(len(data)) if chance.random() < 0.5 else len(data) - 1)
        length = chance.choice((1, 2, 4, 8, chance.randrange(1, 40)))
        match chance.randrange(10):
            case 0 | 1:
                data[at] ^= 1 << chance.randrange(8)
            case 2:
                data[at] = chance.choice((0, 1, 0x20, 0x22, 0x7F, 0x80, 0xC0, 0xFE, 0xFF, chance.randrange(256)))
            case 3:
                del data[at:]
            case 4:
                del data[at : at + length]
            case 5:
                data[at:at] = data[at : at + length] * chance.choice((1, 1, 2, 40))
            case 6:
                other = chance.choice((content, *others))
                begin = chance.randrange(len(other) + 1)
                data[at : at + length] = other[begin : begin + chance.randrange(64)]
            case 7:
                data[at:at] = bytes(chance.randrange(256) for _ in range(chance.randrange(1, 9)))
            case 8:
                width = chance.choice((2, 4, 8))
                old = int.from_bytes(data[at : at + width], "little")
                value = odd_integer(chance, old, len(data)) % (1 << 8 * width)
                data[at : at + width] = value.to_bytes(width, chance.choice(("little", "big")))
            case 9:
                data[at : at + length] = bytes([chance.choice((0, 0xFF, 0x41))]) * length
    return bytes(data)


def by_fields(find: Callable[[bytes], Sequence[Field]], finish: Callable[[bytes], bytes] = bytes) -> Mutator:
    """Return a mutator that changes integers where ``find`` finds them, or else any bytes.

    ``finish`` mends checksums afterwards.
    """
    cached = functools.lru_cache(maxsize=64)(find)

    def mutate(chance: random.Random, content: bytes, others: Sequence[bytes]) -> bytes:
        fields = cached(content)
        if not fields or chance.randrange(4) == 0:
            content = mutate_bytes(chance, content, others)
            return finish(content) if chance.random() < 0.7 else content
        data = bytearray(content)
        for _ in range(chance.choice((1, 1, 1, 2, 3))):
            at, width, order = chance.choice(fields)
            old = int.from_bytes(data[at : at + width], order)  # type: ignore[arg-type]
            value = odd_integer(chance, old, len(data)) % (1 << 8 * width)
            data[at : at + width] = value.to_bytes(width, order)  # type: ignore[arg-type]
        return finish(bytes(data))

    return mutate


def either(*mutators: Mutator) -> Mutator:
    """Return a mutator that applies one of several."""

    def mutate(chance: random.Random, content: bytes, others: Sequence[bytes]) -> bytes:
        return chance.choice(mutators)(chance, content, others)

    return mutate


# GGUF: the file is taken apart, and put together with other fields.

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@functools.lru_cache(maxsize=32)
def _gguf_parts(content: bytes) -> tuple[list[Any], list[Any], bytes]:
    """Return (name, type, raw value), (name, dimensions, type, offset) and the data of a valid file."""
    position = 24
    count, pairs = struct.unpack_from("<QQ", content, 8)

    def take(code: str) -> int:
        nonlocal position
        (value,) = struct.unpack_from("<" + code, content, position)
        position += struct.calcsize("<" + code)
        return int(value)

    def text() -> bytes:
        nonlocal position
        length = take("Q")
        position += length
        return content[position - length : position]

    def skip(kind: int) -> None:
        nonlocal position
        if kind == 8:
            text()
        elif kind == 9:
            inner, length = take("I"), take("Q")
            for _ in range(length):
                skip(inner)
        else:
            position += struct.calcsize("<" + _SCALARS[kind])

    metadata = []
    for _ in range(pairs):
        name, kind = text(), take("I")
        begin = position
        skip(kind)
        metadata.append((name, kind, content[begin:position]))
    tensors = []
    for _ in range(count):
        name = text()
        dimensions = tuple(take("Q") for _ in range(take("I")))
        tensors.append((name, dimensions, take("I"), take("Q")))
    return metadata, tensors, content[-(-position // 32) * 32 :]


def _gguf_text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


_NAMES = (
    b"",
    b"a",
    b"\xff\xfe",
    b"a\x00b",
    b"\x1b[2J",
    b"general.alignment",
    b"blk.0.attn_q.weight",
    b"x" * 70_000,
    b"a." * 3000,
    "\u00b2".encode(),
)


def mutate_gguf(chance: random.Random, content: bytes, others: Sequence[bytes]) -> bytes:
    """Change version, counts, types, lengths, dimensions, offsets, names and the alignment of a GGUF file."""
    if chance.randrange(4) == 0:
        return mutate_bytes(chance, content[: chance.choice((400, 2000, len(content)))], others)
    metadata, tensors, data = _gguf_parts(content)
    metadata, tensors = list(metadata), list(tensors)
    version, count_change, pair_change, padding = 3, 0, 0, None
    for _ in range(chance.choice((1, 1, 2, 3))):
        match chance.randrange(12):
            case 0:
                version = chance.choice((0, 1, 2, 3, 4, 2**31, 0x03000000))
            case 1:
                count_change = chance.choice((-1, 1, 1000, 2**40, 2**63))
            case 2:
                pair_change = chance.choice((-1, 1, 1000, 2**40, 2**63))
            case 3:
                index = chance.randrange(len(metadata))
                name, kind, value = metadata[index]
                metadata[index] = (name, chance.choice((*range(14), 255, 2**32 - 1)), value)
            case 4:
                index = chance.randrange(len(metadata))
                name, kind, value = metadata[index]
                metadata[index] = (chance.choice((*_NAMES, name)), kind, mutate_bytes(chance, value, ()))
            case 5:
                alignment = chance.choice((0, 1, 2, 3, 7, 8, 31, 33, 64, 4096, 2**31, 2**32 - 1))
                kind = chance.choice((4, 4, 4, 5, 6, 7, 10))
                packed = struct.pack("<Q", alignment)[: 1 if kind == 7 else 4 if kind < 10 else 8]
                metadata.append((b"general.alignment", kind, packed))
            case 6:
                inner = chance.choice((*range(14), 99))
                length = chance.choice((0, 1, 3, 2**20, 2**40, 2**62, 2**64 - 1))
                depth = chance.choice((1, 1, 2, 7, 8, 9, 40, 3000))
                value = struct.pack("<IQ", 9, 1) * (depth - 1) + struct.pack("<IQ", inner, length)
                metadata.append((b"array", 9, value + bytes(chance.choice((0, 8, 64)))))
            case 7:
                metadata.append(chance.choice(metadata))
            case 8 if tensors:
                tensors.append(chance.choice(tensors))
            case 9 if tensors:
                index = chance.randrange(len(tensors))
                name, dimensions, kind, offset = tensors[index]
                sizes = list(dimensions)
                if sizes and chance.random() < 0.6:
                    at = chance.randrange(len(sizes))
                    sizes[at] = odd_integer(chance, sizes[at], len(content)) % 2**64
                else:
                    sizes = [chance.choice((0, 1, 2, 32, 2**20, 2**63))] * chance.choice((0, 1, 2, 3, 4, 5, 6, 600))
                tensors[index] = (name, tuple(sizes), kind, offset)
            case 10 if tensors:
                index = chance.randrange(len(tensors))
                name, dimensions, kind, offset = tensors[index]
                tensors[index] = (name, dimensions, chance.choice((*range(42), 255, 2**31)), offset)
            case 11 if tensors:
                index = chance.randrange(len(tensors))
                name, dimensions, kind, offset = tensors[index]
                moved = odd_integer(chance, offset, len(data)) % 2**64
                tensors[index] = (chance.choice((*_NAMES, name, name)), dimensions, kind, moved)
            case _:
                padding = chance.choice((0, 1, 31, 33))
    head = b"GGUF" + struct.pack("<I", version)
    head += struct.pack("<QQ", (len(tensors) + count_change) % 2**64, (len(metadata) + pair_change) % 2**64)
    head += b"".join(_gguf_text(name) + struct.pack("<I", kind) + value for name, kind, value in metadata)
    for name, dimensions, kind, offset in tensors:
        sizes_bytes = struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions)
        head += _gguf_text(name) + sizes_bytes + struct.pack("<IQ", kind, offset)
    head += bytes(-len(head) % 32 if padding is None else padding)
    whole = head + data
    return whole[: chance.randrange(len(whole))] if chance.random() < 0.05 else whole


# safetensors: the header is JSON.


def mutate_safetensors(chance: random.Random, content: bytes, others: Sequence[bytes]) -> bytes:
    """Change names, types, shapes and offsets in the header of a safetensors file, its length, and the data."""
    from fuzzing.values import dump_json, mutate_value

    if chance.randrange(5) == 0:
        return mutate_bytes(chance, content, others)
    (length,) = struct.unpack_from("<Q", content)
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    for _ in range(chance.choice((1, 1, 2))):
        name = chance.choice([key for key in header if key != "__metadata__"])
        entry = dict(header[name]) if isinstance(header[name], dict) else None
        if entry is None or chance.random() < 0.4:
            header = mutate_value(chance, header, ())
            if not isinstance(header, dict) or not [key for key in header if key != "__metadata__"]:
                break
            continue
        kinds = ("F32", "F16", "BF16", "F64", "I8", "U8", "I32", "I64", "U16", "BOOL", "F8_E4M3", "F8_E5M2", "F4")
        more = ("C64", "F6_E2M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I4", "U64")
        match chance.randrange(4):
            case 0:
                entry["dtype"] = chance.choice((*kinds, *more))
            case 1:
                sizes = [0, 1, 2, 3, 4, 2**31, 2**32, 2**63, 2**64 - 1]
                entry["shape"] = [chance.choice(sizes) for _ in range(chance.choice((0, 1, 2, 3, 5, 70)))]
            case 2:
                begin, end = sorted(chance.choice((0, 1, 4, 64, 2**31, 2**63)) for _ in range(2))
                entry["data_offsets"] = chance.choice(([begin, end], [end, begin], entry.get("data_offsets")))
            case 3:
                # Another shape and type of the same number of bytes.
                begin, end = entry.get("data_offsets", (0, 0)) if entry.get("data_offsets") else (0, 0)
                entry["dtype"] = chance.choice(("U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "BOOL", "F4", "F6_E2M3"))
                entry["shape"] = [int(end) - int(begin)] if isinstance(end, int) and isinstance(begin, int) else [0]
        header = {**header, name: entry}
    raw = dump_json(header)
    stated = len(raw) if chance.random() < 0.9 else odd_integer(chance, len(raw), len(content)) % 2**64
    if chance.random() < 0.1:
        data = data[: chance.randrange(len(data) + 1)] + bytes(chance.choice((0, 1, 100)))
    return struct.pack("<Q", stated) + raw + data


# Protobuf messages (ONNX): a tree of fields.

_DEEP = (
    {  # fields of ModelProto whose bytes are messages, as far down as readers go
        7: "graph", 8: "opset", 14: "pair", 25: "function",
    },
    {"graph": {1: "node", 5: "tensor", 11: "value", 12: "value", 13: "value", 15: "sparse"},
     "node": {5: "attribute", 9: "pair"}, "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph"},
     "tensor": {13: "pair"}, "function": {7: "node"}, "sparse": {1: "tensor", 2: "tensor"}, "value": {2: "type"},
     "type": {1: "tensor_type"}, "tensor_type": {2: "shape"}, "shape": {1: "dim"}},
)  # fmt: skip


def _varint(value: int) -> bytes:
    value %= 2**64
    content = bytearray()
    while value > 0x7F:
        content.append(value & 0x7F | 0x80)
        value >>= 7
    content.append(value)
    return bytes(content)


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7


def _message(data: bytes, kind: str) -> list[Any]:
    """Return [number, wire type, value] of each field; the value of a message is such a list itself."""
    inner = _DEEP[0] if kind == "model" else _DEEP[1].get(kind, {})
    fields, position = [], 0
    while position < len(data):
        key, position = _read_varint(data, position)
        number, wire = key >> 3, key & 7
        value: Any
        if wire == 0:
            value, position = _read_varint(data, position)
        else:
            length, position = _read_varint(data, position) if wire == 2 else ({1: 8, 5: 4}[wire], position)
            value, position = data[position : position + length], position + length
            if wire == 2 and number in inner:
                value = _message(value, inner[number])
        fields.append([number, wire, value])
    return fields


def _encoded(fields: list[Any]) -> bytes:
    parts = []
    for number, wire, value in fields:
        content = _encoded(value) if isinstance(value, list) else value
        if wire == 2 and isinstance(content, bytes):
            parts.append(_varint(number << 3 | 2) + _varint(len(content)) + content)
        elif isinstance(content, int):
            parts.append(_varint(number << 3 | wire) + _varint(content))
        else:
            parts.append(_varint(number << 3 | wire) + content)
    return b"".join(parts)


@functools.lru_cache(maxsize=32)
def _onnx_tree(content: bytes) -> list[Any]:
    return _message(content, "model")


def _lists(fields: list[Any], path: tuple[int, ...] = ()) -> Iterator[tuple[int, ...]]:
    yield path
    for index, (_, _, value) in enumerate(fields):
        if isinstance(value, list):
            yield from _lists(value, (*path, index))


def _with_list(fields: list[Any], path: tuple[int, ...], change: Callable[[list[Any]], list[Any]]) -> list[Any]:
    if not path:
        return change(list(fields))
    number, wire, value = fields[path[0]]
    copy = list(fields)
    copy[path[0]] = [number, wire, _with_list(value, path[1:], change)]
    return copy


def mutate_onnx(chance: random.Random, content: bytes, others: Sequence[bytes]) -> bytes:
    """Change numbers, wire types, integers, names and the order of the fields of a model's messages."""
    if chance.randrange(6) == 0:
        return mutate_bytes(chance, content, others)
    tree = _onnx_tree(content)
    for _ in range(chance.choice((1, 1, 2, 3))):
        by_depth: dict[int, list[tuple[int, ...]]] = {}
        for path in _lists(tree):
            by_depth.setdefault(len(path), []).append(path)
        path = chance.choice(by_depth[chance.choice(list(by_depth))])
        tree = _with_list(tree, path, lambda fields: _changed_fields(chance, fields, content, others))
    encoded = _encoded(tree)
    return encoded[: chance.randrange(len(encoded) + 1)] if chance.random() < 0.03 else encoded


def _changed_fields(chance: random.Random, fields: list[Any], content: bytes, others: Sequence[bytes]) -> list[Any]:
    at = chance.randrange(len(fields)) if fields else 0
    if not fields or chance.randrange(8) == 0:
        new = chance.choice(
            ([chance.randrange(1, 16), 0, chance.choice((*INTEGERS, *HUGE))], [1, 2, b""], [5, 2, b"x"])
        )
        return [*fields[:at], new, *fields[at:]]
    number, wire, value = fields[at]
    match chance.randrange(8):
        case 0:
            del fields[at]
        case 1:
            fields[at:at] = [fields[at]] * chance.choice((1, 1, 50))
        case 2:
            fields[at] = [chance.choice((chance.randrange(1, 27), 0, 10_000, 2**29)), wire, value]
        case 3:
            fields[at] = [number, chance.randrange(8), value if isinstance(value, bytes) else b"\x01\x02\x03\x04"]
        case 4:
            chance.shuffle(fields)
        case 5:
            source = _onnx_tree(chance.choice((content, *others)))
            for _ in range(chance.randrange(1, 6)):
                lists = [entry[2] for entry in source if isinstance(entry[2], list)]
                if not lists:
                    break
                source = chance.choice(lists)
            fields[at:at] = source[: chance.randrange(1, 4)]
        case 6 if isinstance(value, list):
            depth = chance.choice((1, 2, 10, 150, 400))
            for _ in range(depth):
                value = [[1, 2, [[5, 2, [[6, 2, value]]]]]]
            fields[at] = [number, wire, value]
        case _ if isinstance(value, int):
            fields[at] = [number, wire, odd_integer(chance, value, len(content))]
        case _ if isinstance(value, bytes):
            texts = (
                b"",
                b"\xff",
                b"a\x00b",
                b"../x",
                b"/etc/passwd",
                b"w.bin",
                b"-1",
                b"9" * 30,
                b"MatMul",
                b"\x1b[2J",
            )
            fields[at] = [
                number,
                wire,
                chance.choice((chance.choice(texts), mutate_bytes(chance, value, ()), value * 3)),
            ]
    return fields


# Chunks: PNG and RIFF (WAV, WebP).


def mutate_png(chance: random.Random, content: bytes, others: Sequence[bytes]) -> bytes:
    """Change, copy, move and remove chunks of a PNG image, with valid checksums."""
    if content[:4] != b"\x89PNG" or chance.randrange(6) == 0:
        return mutate_bytes(chance, content, others)
    chunks, position = [], 8
    while position + 12 <= len(content):
        (length,) = struct.unpack_from(">I", content, position)
        chunks.append((content[position + 4 : position + 8], content[position + 8 : position + 8 + length]))
        position += 12 + length
    for _ in range(chance.choice((1, 1, 2))):
        index = chance.randrange(len(chunks))
        kind, data = chunks[index]
        match chance.randrange(7):
            case 0:
                del chunks[index]
                chunks = chunks or [(b"IEND", b"")]
            case 1:
                chunks.insert(chance.randrange(len(chunks)), chunks[index])
            case 2 if chunks[0][0] == b"IHDR" and len(chunks[0][1]) == 13:
                fields = list(struct.unpack(">IIBBBBB", chunks[0][1]))
                at = chance.randrange(7)
                sizes = (0, 1, 2, 3, 100, 5000, 20_000, 2**31 - 1, 2**32 - 1)
                fields[at] = chance.choice(sizes) if at < 2 else chance.choice((0, 1, 2, 3, 4, 6, 8, 16, 255))
                chunks[0] = (b"IHDR", struct.pack(">IIBBBBB", *fields))
            case 3:
                kinds = (
                    b"tRNS",
                    b"PLTE",
                    b"eXIf",
                    b"iCCP",
                    b"tEXt",
                    b"zTXt",
                    b"iTXt",
                    b"gAMA",
                    b"acTL",
                    b"fcTL",
                    b"fdAT",
                )
                body = chance.choice(
                    (b"", b"\0", data, bytes(chance.randrange(256) for _ in range(40)), b"a\0\0" + data)
                )
                chunks.insert(chance.randrange(len(chunks)), (chance.choice(kinds), body))
            case 4 if kind == b"IDAT":
                pixels = bytes(chance.choice((0, 1, 10, 10**6)))
                chunks[index] = (kind, zlib.compress(pixels))
            case 5:
                chance.shuffle(chunks)
            case _:
                chunks[index] = (kind, mutate_bytes(chance, data, ()))
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    ]
    return content[:8] + b"".join(parts)


def mutate_riff(chance: random.Random, content: bytes, others: Sequence[bytes]) -> bytes:
    """Change, copy, move and remove chunks of a RIFF file, and the fields of its format."""
    if content[:4] != b"RIFF" or chance.randrange(6) == 0:
        return mutate_bytes(chance, content, others)
    chunks, position = [], 12
    while position + 8 <= len(content):
        (length,) = struct.unpack_from("<I", content, position + 4)
        chunks.append([content[position : position + 4], content[position + 8 : position + 8 + length], None])
        position += 8 + length + length % 2
    total = None
    for _ in range(chance.choice((1, 1, 2, 3))):
        index = chance.randrange(len(chunks))
        kind, data, _ = chunks[index]
        match chance.randrange(7):
            case 0 if len(chunks) > 1:
                del chunks[index]
            case 1:
                chunks.insert(chance.randrange(len(chunks)), list(chunks[index]))
            case 2:
                chunks[index][2] = odd_integer(chance, len(data), len(content)) % 2**32
            case 3:
                total = odd_integer(chance, len(content), len(content)) % 2**32
            case 4 | 5 if kind == b"fmt " and len(data) >= 16:
                fields = list(struct.unpack_from("<HHIIHH", data))
                at = chance.randrange(6)
                fields[at] = odd_integer(chance, fields[at], 100) % (2**32 if at in (2, 3) else 2**16)
                chunks[index][1] = struct.pack("<HHIIHH", *fields) + data[16:]
            case _:
                chunks[index][1] = mutate_bytes(chance, data, ())
    body = b"".join(
        kind + struct.pack("<I", len(data) if length is None else length) + data + bytes(len(data) % 2)
        for kind, data, length in chunks
    )
    return b"RIFF" + struct.pack("<I", len(body) + 4 if total is None else total) + content[8:12] + body


# Fields at known places.


def word_fields(content: bytes) -> list[Field]:
    """Return the 32-bit words that may be offsets or lengths within the file, as in FlatBuffers."""
    words = struct.unpack(f"<{len(content) // 4}I", content[: len(content) // 4 * 4])
    return [(4 * index, 4, "little") for index, word in enumerate(words) if 0 < word <= len(content)]


def table_fields(content: bytes) -> list[Field]:
    """Return words that may be offsets, and the 16-bit entries of tables, as in FlatBuffers."""
    shorts = [(at, 2, "little") for at in range(0, len(content) - 1, 2) if 0 < content[at] < 64 and not content[at + 1]]
    return [*word_fields(content), *shorts[::3]]


def tiff_fields(content: bytes) -> list[Field]:
    """Return the fields of the entries of a TIFF image's first directory."""
    order = "little" if content[:2] == b"II" else "big"
    at = int.from_bytes(content[4:8], order)  # type: ignore[arg-type]
    count = int.from_bytes(content[at : at + 2], order)  # type: ignore[arg-type]
    entries = [(at + 2 + 12 * index + offset, width, order) for index in range(count) for offset, width in _ENTRY]
    return [(4, 4, order), (at, 2, order), *entries]


_ENTRY = ((0, 2), (2, 2), (4, 4), (8, 4))


def jpeg_fields(content: bytes) -> list[Field]:
    """Return the lengths of a JPEG image's segments, and the sizes in its frame."""
    fields, at = [], 2
    while at + 4 <= len(content) and content[at] == 0xFF and content[at + 1] != 0xDA:
        fields.append((at + 2, 2, "big"))
        if 0xC0 <= content[at + 1] <= 0xC2:
            fields += [(at + 5, 2, "big"), (at + 7, 2, "big"), (at + 9, 1, "big")]
        at += 2 + int.from_bytes(content[at + 2 : at + 4], "big")
    return fields


def header_fields(count: int, order: str = "little") -> Callable[[bytes], list[Field]]:
    """Return a function that finds 16-bit and 32-bit words in the first bytes of a file."""

    def find(content: bytes) -> list[Field]:
        end = min(count, len(content) - 4)
        return [(at, width, order) for width in (2, 4) for at in range(0, end, 2)]

    return find


def parquet_fields(content: bytes) -> list[Field]:
    """Return the bytes of a Parquet file's footer, which is Thrift with integers of one byte and more."""
    length = int.from_bytes(content[-8:-4], "little")
    begin = len(content) - 8 - length
    return [(len(content) - 8, 4, "little"), *((at, 1, "little") for at in range(begin, len(content) - 8))]


def sqlite_fields(content: bytes) -> list[Field]:
    """Return header fields, page headers and cell pointers of an SQLite file."""
    size = int.from_bytes(content[16:18], "big") or 4096
    fields = [(at, 4, "big") for at in range(24, 72, 4)] + [(16, 2, "big"), (18, 1, "big"), (19, 1, "big")]
    for page in range(0, len(content), size):
        begin = page + (100 if page == 0 else 0)
        fields += [(begin, 1, "big"), *((begin + offset, 2, "big") for offset in (1, 3, 5)), (begin + 8, 2, "big")]
        fields += [(begin + 10 + 2 * index, 2, "big") for index in range(4)]
    return [field for field in fields if field[0] + field[1] <= len(content)]


def zip_fields(content: bytes) -> list[Field]:
    """Return the fields of a zip's entries, of its directory and of the record at its end."""
    fields: list[Field] = []
    for mark, layout in _ZIP_LAYOUTS.items():
        at = content.find(mark)
        while at >= 0:
            offset = at + 4
            for width in layout:
                fields.append((offset, width, "little"))
                offset += width
            at = content.find(mark, at + 4)
    return [field for field in fields if field[0] + field[1] <= len(content)]


_ZIP_LAYOUTS = {
    b"PK\x03\x04": (2, 2, 2, 2, 2, 4, 4, 4, 2, 2),
    b"PK\x01\x02": (2, 2, 2, 2, 2, 2, 4, 4, 4, 2, 2, 2, 2, 2, 4, 4),
    b"PK\x05\x06": (2, 2, 2, 2, 4, 4, 2),
}


def mutate_zip(chance: random.Random, content: bytes, others: Sequence[bytes]) -> bytes:
    """Write a zip anew with other names, attributes, sizes and contents."""
    names = (b"../x", b"/x", b"a/../b", b"C:/x", b"a\\b", b"a//b", b"./a", b"a/", b"", b".", b"CON", b"MANIFEST.JSON")
    with zipfile.ZipFile(io.BytesIO(content)) as opened:
        entries = [(entry.filename, entry.external_attr, opened.read(entry)) for entry in opened.infolist()]
        comment = opened.comment
    for _ in range(chance.choice((1, 1, 2))):
        index = chance.randrange(len(entries))
        name, attributes, data = entries[index]
        match chance.randrange(6):
            case 0:
                entries[index] = (chance.choice(names).decode(), attributes, data)
            case 1:
                kinds = (0o120777, 0o020666, 0o010644, 0o040755, 0)
                entries[index] = (name, chance.choice(kinds) << 16, data)
            case 2:
                entries[index] = (name, attributes, mutate_bytes(chance, data, ()))
            case 3:
                entries.append((chance.choice((name, name.upper(), name + "/x", "new")), attributes, data))
            case 4 if len(entries) > 1:
                del entries[index]
            case _:
                entries[index] = (name, attributes, bytes(chance.choice((0, 1, 10**5, 10**6))))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", chance.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED))) as packed:
        for name, attributes, data in entries:
            entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            entry.external_attr = attributes
            packed._didModify = True  # type: ignore[attr-defined]
            packed.writestr(entry, data)
        packed.comment = comment
    return buffer.getvalue()


def resealed(content: bytes) -> bytes:
    """Return the zip of a bundle with the digest of its bytes at the end, as `compress bundle` writes it."""
    return content[:-64] + hashlib.sha256(content[:-64]).hexdigest().encode() if len(content) > 64 else content
