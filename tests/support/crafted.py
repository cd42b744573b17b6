"""Files of about one megabyte that ask their reader for as much memory or time as possible."""

from __future__ import annotations

import io
import json
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np

SIZE = 1_000_000


class Crafted(NamedTuple):
    """A file, and the statements that import and call its reader with the path `file`."""

    name: str
    write: Callable[[], bytes]
    imports: str
    call: str


def varint(value: int) -> bytes:
    """Return an integer as protobuf stores it."""
    content = b""
    while value > 0x7F:
        content, value = content + bytes([value & 0x7F | 0x80]), value >> 7
    return content + bytes([value])


def message(number: int, content: bytes) -> bytes:
    """Return a field of bytes as protobuf stores it."""
    return varint(number << 3 | 2) + varint(len(content)) + content


def gguf(tensors: int, pairs: int, body: bytes) -> bytes:
    """Return a GGUF file."""
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, pairs) + body


def key(name: bytes) -> bytes:
    """Return a string as GGUF stores it."""
    return struct.pack("<Q", len(name)) + name


def _gguf_tensors() -> bytes:
    count = SIZE // 30
    entries = (key(b"%d" % n) + struct.pack("<IIQ", 0, 0, 0) for n in range(count))
    return gguf(count, 0, b"".join(entries))


def _gguf_pairs() -> bytes:
    count = SIZE // 18
    return gguf(0, count, b"".join(key(b"%x" % n) + struct.pack("<I?", 7, True) for n in range(count)))


def _gguf_array(kind: int, entry: bytes, count: int) -> bytes:
    return gguf(0, 1, key(b"a") + struct.pack("<IIQ", 9, kind, count) + entry * (SIZE // max(1, len(entry))))


def _gguf_empty_arrays() -> bytes:
    return _gguf_array(9, struct.pack("<IQ", 4, 0), SIZE // 12)


def _gguf_huge_key() -> bytes:
    return gguf(0, 1, key(b"k" * SIZE) + struct.pack("<I?", 7, True))


def _onnx(field: int, content: bytes) -> Callable[[], bytes]:
    """Return a graph that repeats a field."""
    return lambda: message(7, message(field, content) * (SIZE // (len(content) + 2)))


def _onnx_nested(depth: int) -> bytes:
    graph = b""
    for _ in range(depth):
        graph = message(1, message(5, message(6, graph)))
    return message(7, graph)


def _onnx_nested_wide() -> bytes:
    graph = b""
    # Each level would be copied by a reader that slices messages.
    for _ in range(60):
        graph = message(1, message(4, b"If" * 8000) + message(5, message(6, graph)))
    return message(7, graph)


def _onnx_shared() -> bytes:
    """Nodes that all read one tensor, with outputs that lead to all others."""
    node = message(1, b"a") + message(2, b"a") + message(4, b"Add")
    return message(7, message(5, b"\x10\x01" + message(8, b"a.bias")) + message(1, node) * (SIZE // 20))


def _onnx_scopes() -> bytes:
    pair = message(1, b"pkg.torch.onnx.name_scopes") + message(2, b"[" * 90 + b"]" * 90)
    node = message(1, b"w") + message(4, b"MatMul") + message(9, pair)
    return message(7, message(5, b"\x08\x04\x10\x01" + message(8, b"w")) + message(1, node) * (SIZE // 240))


def _onnx_dimensions() -> bytes:
    tensor = message(1, b"\xff" * 8 + b"\x7f") + b"\x10\x01" + message(8, b"w")
    many = message(1, (b"\xff" * 8 + b"\x7f") * (SIZE // 9)) + b"\x10\x01" + message(8, b"w")
    return message(7, message(5, tensor) + message(5, many))


def _safetensors(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def _safetensors_tensors() -> bytes:
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    return _safetensors(json.dumps({f"{n:x}": entry for n in range(SIZE // 64)}, separators=(",", ":")).encode())


def _safetensors_metadata() -> bytes:
    header = {"__metadata__": {f"{n:x}": "" for n in range(SIZE // 11)}}
    return _safetensors(json.dumps(header, separators=(",", ":")).encode())


def _safetensors_shape() -> bytes:
    shape = ",".join(["18446744073709551615"] * (SIZE // 22))
    return _safetensors(f'{{"a":{{"dtype":"F32","shape":[{shape}],"data_offsets":[0,4]}}}}'.encode(), bytes(4))


def _json_objects() -> bytes:
    return b'{"a":[' + b"{}," * (SIZE // 3) + b"{}]}"


def _json_text(text: str) -> Callable[[], bytes]:
    return text.encode


def _yaml_laughs() -> bytes:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    return "\n".join(lines).encode()


def _yaml_aliases() -> bytes:
    return b"a: &a x\nb:\n" + b"- *a\n" * (SIZE // 5 - 10)


def _yaml_merges() -> bytes:
    lines = ["a0: &a0 {x: 1}"]
    lines += [f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}], k{n}: 1}}" for n in range(1, 5000)]
    return "\n".join(lines).encode()


def _yaml_brackets() -> bytes:
    return b"a: " + b"[" * (SIZE - 10)


def _yaml_keys() -> bytes:
    return b"".join(b"k%d: 1\n" % n for n in range(SIZE // 12))


def _yaml_scalar() -> bytes:
    return b"name: " + b"1" * (SIZE - 100)


def _csv(line: str, header: str) -> Callable[[], bytes]:
    return lambda: (header + line * (SIZE // len(line))).encode()


def _csv_columns() -> bytes:
    names = ",".join(f"{n:x}" for n in range(SIZE // 12))
    return f"{names}\n{',' * names.count(',')}\n".encode()


def _csv_quote() -> bytes:
    return b'text,label\n"' + b"a\n" * (SIZE // 2 - 10)


PARQUET = ("dictionary", "rows", "page", "columns", "nested", "edge-dictionary", "edge-rows", "edge-images", "images")
EDGE = (5_000, 4_990)
"""Size of an image that may expand to as much as readers accept."""


def _parquet(kind: str) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = io.BytesIO()
    if kind == "dictionary":
        values = pa.array(["x" * 1_000_000]).take(pa.array(np.zeros(100_000, np.int64)).cast(pa.int64())[:20])
        schema = pa.schema([("text", pa.dictionary(pa.int32(), pa.string())), ("label", pa.string())])
        with pq.ParquetWriter(sink, schema, compression="zstd") as writer:
            text = pa.DictionaryArray.from_arrays(np.zeros(2_000_000, np.int32), values[:1])
            writer.write_table(pa.table({"text": text, "label": pa.array(["a"] * 2_000_000)}, schema))
    elif kind == "rows":
        table = pa.table({"text": pa.nulls(20_000_000, pa.string()), "label": pa.nulls(20_000_000, pa.string())})
        pq.write_table(table, sink, compression="zstd", row_group_size=1 << 26)
    elif kind == "page":
        # One page of zeros that decompresses to 300 MB.
        table = pa.table({"text": pa.array([bytes(300_000_000)], pa.binary()), "label": pa.array(["a"])})
        pq.write_table(table, sink, compression="zstd", use_dictionary=False, write_statistics=False)
    elif kind == "columns":
        pq.write_table(pa.table({f"{n}": pa.array([1]) for n in range(4000)}), sink, compression="zstd")
    elif kind == "edge-dictionary":
        text = pa.DictionaryArray.from_arrays(np.zeros(90, np.int32), pa.array(["x" * 1_000_000]))
        pq.write_table(pa.table({"text": text, "label": pa.array(["a"] * 90)}), sink, compression="zstd")
    elif kind == "edge-rows":
        texts = pa.array(["aaaa", "bbbb"] * 360_000)
        pq.write_table(pa.table({"text": texts, "label": texts}), sink, compression="zstd")
    elif kind in ("edge-images", "images"):
        count = 90 if kind == "edge-images" else 900
        content = pa.DictionaryArray.from_arrays(np.zeros(count, np.int32), pa.array([b"x" * 1_000_000]))
        shape = pa.schema([("text", pa.struct([("bytes", pa.binary())])), ("label", pa.string())])
        with pq.ParquetWriter(sink, shape, compression="zstd") as writer:
            images = pa.StructArray.from_arrays([content.dictionary_decode()], names=["bytes"])
            writer.write_table(pa.table([images, pa.array(["a"] * count)], schema=shape), row_group_size=1 << 26)
    elif kind == "nested":
        shape = pa.string()
        for _ in range(300):
            shape = pa.list_(shape)
        pq.write_table(pa.table({"text": pa.nulls(1000, shape), "label": pa.nulls(1000, pa.string())}), sink)
    return sink.getvalue()


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _png(width: int, height: int, rows: int, *others: bytes) -> bytes:
    """Return a grayscale PNG of one bit that decompresses to ``rows``."""
    deflate = zlib.compressobj(1)
    row = bytes(1 + (width + 7) // 8)
    data = b"".join(deflate.compress(row) for _ in range(rows)) + deflate.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    parts = [_chunk(b"IHDR", header), *others, _chunk(b"IDAT", data), _chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _png_text() -> bytes:
    """Return a PNG whose text chunks decompress to hundreds of megabytes."""
    chunk = _chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(900_000), 9))
    return _png(8, 8, 8, *[chunk] * (SIZE // len(chunk)))


def _image(form: str, size: tuple[int, int], mode: str = "RGB") -> bytes:
    from PIL import Image

    sink = io.BytesIO()
    Image.new(mode, size).save(sink, form)
    return sink.getvalue()


def _gif_frames() -> bytes:
    from PIL import Image

    sink = io.BytesIO()
    frames = [Image.new("P", (8, 8), n % 255) for n in range(1000)]
    frames[0].save(sink, "GIF", save_all=True, append_images=frames[1:])
    content = sink.getvalue()
    frame = content[-200:-1]
    return content[:-1] + frame * ((SIZE - len(content)) // len(frame)) + b";"


def _ppm() -> bytes:
    return b"P5\n30000 30000\n255\n"


def _wav(samples: int, channels: int = 1) -> bytes:
    size = samples * channels * 2
    form = struct.pack("<HHIIHH", 1, channels, 16000, 32000 * channels, 2 * channels, 16)
    return (
        b"RIFF"
        + struct.pack("<I", min(size + 36, 2**32 - 1))
        + b"WAVEfmt "
        + struct.pack("<I", 16)
        + form
        + (b"data" + struct.pack("<I", min(size, 2**32 - 1)) + b"\x01\x10" * (SIZE // 2))
    )


def _flac(seconds: int, rate: int) -> bytes:
    import soundfile

    sink = io.BytesIO()
    with soundfile.SoundFile(sink, "w", rate, 1, "PCM_16", format="FLAC") as file:
        block = np.zeros(rate, np.float32)
        block[0] = 0.5
        for _ in range(seconds):
            file.write(block)
    return sink.getvalue()


def _flac_declared() -> bytes:
    content = bytearray(_flac(1, 16000))
    # The last 36 bits before the digest in STREAMINFO are the number of samples.
    content[21] |= 0x0F
    content[22:26] = b"\xff" * 4
    return bytes(content)


def _ogg(seconds: int) -> bytes:
    import soundfile

    sink = io.BytesIO()
    with soundfile.SoundFile(sink, "w", 8000, 1, "VORBIS", format="OGG") as file:
        block = np.zeros(8000 * 60, np.float32)
        block[0] = 0.5
        for _ in range(seconds // 60):
            file.write(block)
    return sink.getvalue()


def _npz(size: int) -> bytes:
    """Return an array that decompresses to ``size`` bytes."""
    sink = io.BytesIO()
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "|u1", "fortran_order": False, "shape": (size,)})
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as packed, packed.open("x.npy", "w") as file:
        file.write(head.getvalue())
        for _ in range(size // 10_000_000):
            file.write(bytes(10_000_000))
    return sink.getvalue()


def _npy_declared() -> bytes:
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "<f8", "fortran_order": False, "shape": (10**12,)})
    return head.getvalue() + bytes(1000)


def zip_of_names(count: int) -> bytes:
    """Return a zip with that many empty files."""
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as packed:
        for number in range(count):
            packed.writestr(f"{number:x}", b"")
    return sink.getvalue()


def _zip_bomb() -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as packed:
        for number in range(4):
            packed.writestr(f"{number}.bin", bytes(50_000_000))
        packed.writestr("manifest.json", b"{}")
    return sink.getvalue()


def _tokenizer_json() -> bytes:
    nested = '{"type":"Sequence","normalizers":[' * 20_000 + "]}" * 20_000
    return f'{{"version":"1.0","normalizer":{nested},"model":{{"type":"WordLevel","vocab":{{}}}}}}'.encode()


_GGUF = (
    "from compress.formats.gguf.model import read_gguf\nimport gguf, compress.models.stored_tensor",
    "read_gguf(file)",
)
_ONNX = (
    "import onnx, numpy\nfrom compress.formats.onnx.stored_tensors import read_tensors",
    "read_tensors(file, file.parent)",
)
_SAFE = "import safetensors\nfrom compress.models.safetensors_file import read_header", "read_header(file)"
_JSON = "from compress.models.json_file import read_json", "read_json(file)"
_YAML = "from compress.recipe.loading import read_recipe", "read_recipe(file)"
_DATA = "import pyarrow.parquet\nfrom compress.data.files import read_file", "read_file(file, ['text', 'label'])"
_IMAGE = (
    "from collections import Counter\nimport PIL.Image, numpy\nfrom compress.data.media import decode, media",
    "decode(media(str(file), None), 'RGB', Counter())",
)
_AUDIO = (
    "import soundfile, numpy, scipy.signal\nfrom compress.tasks.audio import Remarks, read_recording",
    "read_recording(file.read_bytes(), 16000, file.name, Remarks())",
)
_ARRAYS = (
    "import numpy\nfrom compress.models.graph_inputs import GraphInput, GraphInputs",
    "GraphInputs((GraphInput('x', 'uint8', (None,), (1,)),)).read(file.read_bytes(), file.name)",
)
_ZIP = (
    "import tempfile\nfrom compress.plugins.apps.archive import unpack",
    "unpack(file, Path(tempfile.mkdtemp()))",
)


def crafted_files() -> Iterator[Crafted]:
    """Yield every file with its reader."""
    for name, write in {
        "1-counts.gguf": lambda: gguf(10**9, 10**9, bytes(SIZE)),
        "2-tensors.gguf": _gguf_tensors,
        "3-pairs.gguf": _gguf_pairs,
        "4-empty-strings.gguf": lambda: _gguf_array(8, bytes(8), SIZE // 8),
        "5-empty-arrays.gguf": _gguf_empty_arrays,
        "6-long-key.gguf": _gguf_huge_key,
        "7-endless-array.gguf": lambda: _gguf_array(9, struct.pack("<IQ", 0, 2**60), 2**60),
    }.items():
        yield Crafted(name, write, *_GGUF)
    for name, write in {
        "1-nodes.onnx": _onnx(1, b""),
        "2-tensors.onnx": _onnx(5, b""),
        "3-inputs.onnx": lambda: message(7, message(1, message(1, b"") * (SIZE // 2))),
        "4-nested.onnx": lambda: _onnx_nested(30_000),
        "5-nested-wide.onnx": _onnx_nested_wide,
        "6-shared.onnx": _onnx_shared,
        "7-scopes.onnx": _onnx_scopes,
        "8-dimensions.onnx": _onnx_dimensions,
        "9-functions.onnx": lambda: message(7, b"") + message(25, message(7, b"")) * (SIZE // 4),
        "10-attributes.onnx": lambda: message(7, message(1, message(5, b"") * (SIZE // 2))),
        "11-sparse.onnx": lambda: message(7, message(15, message(1, b"")) * (SIZE // 4)),
        "12-metadata.onnx": lambda: message(7, message(1, message(9, b"") * (SIZE // 2))),
        "13-packed.onnx": lambda: message(7, message(5, message(1, b"\x01" * SIZE))),
    }.items():
        yield Crafted(name, write, *_ONNX)
    for name, write in {
        "1-tensors.safetensors": _safetensors_tensors,
        "2-metadata.safetensors": _safetensors_metadata,
        "3-shape.safetensors": _safetensors_shape,
        "4-nested.safetensors": lambda: _safetensors(b"[" * SIZE),
        "5-declared.safetensors": lambda: struct.pack("<Q", 99_000_000) + b"{}",
    }.items():
        yield Crafted(name, write, *_SAFE)
    for name, write in {
        "1-objects.json": _json_objects,
        "2-brackets.json": _json_text("[" * SIZE),
        "3-number.json": _json_text('{"a":' + "1" * SIZE + "}"),
        "4-exponent.json": _json_text('{"a":' + "1e9," * 0 + "1" * 4000 + "e" + "9" * 9 + "}"),
        "5-escapes.json": _json_text('{"a":"' + "\\u4e2d" * (SIZE // 6) + '"}'),
        "6-repeated-keys.json": _json_text("{" + ",".join(['"a":{}'] * (SIZE // 7)) + "}"),
    }.items():
        yield Crafted(name, write, *_JSON)
    for name, write in {
        "1-laughs.yaml": _yaml_laughs,
        "2-aliases.yaml": _yaml_aliases,
        "3-merges.yaml": _yaml_merges,
        "4-brackets.yaml": _yaml_brackets,
        "5-keys.yaml": _yaml_keys,
        "6-scalar.yaml": _yaml_scalar,
        "7-one-letter.yaml": lambda: b"a:\n" + b"- a\n" * (SIZE // 4 - 10),
        "8-flow.yaml": lambda: b"a: [" + b"a," * (SIZE // 2 - 10) + b"]",
    }.items():
        yield Crafted(name, write, *_YAML)
    for name, write in {
        "1-short-rows.csv": _csv("a,b\n", "text,label\n"),
        "2-columns.csv": _csv_columns,
        "3-open-quote.csv": _csv_quote,
        "4-quotes.csv": _csv('"","a"\n', "text,label\n"),
        "5-separators.csv": lambda: b"text,label\n" + b",;\t|" * (SIZE // 4) + b"\n",
        "1-rows.jsonl": _csv("{}\n", '{"text":"a","label":"b"}\n'),
        "2-fields.jsonl": lambda: json.dumps({f"{n:x}": 1 for n in range(SIZE // 12)}).encode(),
        "3-new-fields.jsonl": lambda: b"".join(b'{"%x":1}\n' % n for n in range(SIZE // 14)),
        "4-nested.jsonl": lambda: b'{"a":' * 900 + b"1" + b"}" * 900 + b"\n",
        "7-rows.json": lambda: b"[" + b"{}," * (SIZE // 3) + b"{}]",
        "8-nested.json": lambda: b"[" * SIZE,
        "1-lines.txt": lambda: b"a\n" * (SIZE // 2),
        **{f"{kind}.parquet": partial(_parquet, kind) for kind in PARQUET},
    }.items():
        yield Crafted(name, write, *_DATA)
    for name, write in {
        "1-large.png": lambda: _png(50_000, 50_000, 50_000),
        "2-declared.png": lambda: _png(50_000, 50_000, 1),
        "3-texts.png": _png_text,
        "4-most-pixels.png": lambda: _png(9_000, 9_900, 9_900),
        "5-wide.png": lambda: _png(2**31 - 1, 1, 0),
        "6-most-pixels.webp": lambda: _image("WEBP", (9_000, 9_900)),
        "7-most-pixels.tiff": lambda: _image("TIFF", (10, 10)),
        "8-frames.gif": _gif_frames,
        "9-declared.ppm": _ppm,
        "10-rgba.png": lambda: _image("PNG", (9_000, 9_900), "RGBA"),
        "11-wide.png": lambda: _image("PNG", (9_000, 9_900), "I;16"),
        "12-most-pixels.jpg": lambda: _image("JPEG", (9_000, 9_900)),
        "13-edge.webp": lambda: _image("WEBP", EDGE),
        "14-edge.png": lambda: _image("PNG", EDGE, "RGBA"),
        "15-edge.png": lambda: _image("PNG", EDGE, "I;16"),
        "16-edge.png": lambda: _image("PNG", EDGE, "LA"),
        "17-edge.gif": lambda: _image("GIF", EDGE, "P"),
        "18-edge.tiff": lambda: _image("TIFF", EDGE, "1"),
        "19-edge.jpg": lambda: _image("JPEG", EDGE, "CMYK"),
        "20-edge.png": lambda: _png(*EDGE, EDGE[1]),
    }.items():
        yield Crafted(name, write, *_IMAGE)
    for name, write in {
        "1-declared.wav": lambda: _wav(2**31),
        "2-channels.wav": lambda: _wav(2**16, 1000),
        "3-silence.flac": lambda: _flac(300, 192_000),
        "4-declared.flac": _flac_declared,
        "6-most-samples.flac": lambda: _flac(255, 192_000),
        "7-most-samples.ogg": lambda: _ogg(3000),
    }.items():
        yield Crafted(name, write, *_AUDIO)
    for name, write in {
        "1-bomb.npz": lambda: _npz(300_000_000),
        "2-declared.npy": _npy_declared,
        "3-edge.npz": lambda: _npz(90_000_000),
    }.items():
        yield Crafted(name, write, *_ARRAYS)
    for name, write in {"1-bomb.zip": _zip_bomb, "2-names.zip": lambda: zip_of_names(SIZE // 80)}.items():
        yield Crafted(name, write, *_ZIP)
