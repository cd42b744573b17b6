"""Defects that `benchmarks/fuzz.py` found: each of these files once ended in a traceback or in gigabytes of memory."""

from __future__ import annotations

import functools
import json
import os
import re
import sqlite3
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

_environment = dict(os.environ)
from fuzzing.targets import TARGETS  # noqa: E402
from fuzzing.worker import load_seeds, read_case  # noqa: E402

os.environ.clear()
os.environ.update(_environment)
KINDS = {target.kind: target for target in TARGETS}
Change = Callable[[bytes], bytes]
DIGITS = "1" * 5000
DEEP = "[" * 100_000


def fields(**changes: Any) -> Change:
    """Return a change of top-level fields of a JSON object."""
    return lambda content: json.dumps(json.loads(content) | changes).encode()


def text(old: str, new: str) -> Change:
    """Return a change of a text that occurs in the file."""

    def change(content: bytes) -> bytes:
        assert old.encode() in content
        return content.replace(old.encode(), new.encode("utf-8", "surrogatepass"))

    return change


def whole(content: str | bytes) -> Change:
    """Return a change of the whole content."""
    return lambda _: content.encode() if isinstance(content, str) else content


def quantization(**changes: Any) -> Change:
    """Return a change of fields of a config's quantization_config."""

    def change(content: bytes) -> bytes:
        config = json.loads(content)
        return json.dumps(config | {"quantization_config": config["quantization_config"] | changes}).encode()

    return change


def gguf_key(name: str, kind: int, value: bytes) -> Change:
    """Return a change that puts one more key before those of a GGUF file, with a count that fits."""

    def change(content: bytes) -> bytes:
        (pairs,) = struct.unpack_from("<Q", content, 16)
        key = struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", kind) + value
        return content[:16] + struct.pack("<Q", pairs + 1) + key + content[24:]

    return change


def statement(sql: str, *values: object) -> Change:
    """Return a change of a history by SQL."""

    def change(content: bytes) -> bytes:
        connection = sqlite3.connect(":memory:", isolation_level=None)
        connection.deserialize(content)
        connection.execute(sql, values)
        return connection.serialize()

    return change


def nameless_member(content: bytes) -> bytes:
    """Return a sealed zip with an entry without a name."""
    import io

    from fuzzing.contents import resealed

    with zipfile.ZipFile(io.BytesIO(content)) as opened:
        comment = opened.comment
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as packed:
        packed.writestr(zipfile.ZipInfo(""), b"x")
        packed.comment = comment
    return resealed(buffer.getvalue())


def wav(rate: int, frames: int) -> bytes:
    """Return a recording whose header states a rate and a number of frames, and which holds 100 bytes."""
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, rate, rate * 2 & 0xFFFFFFFF, 2, 16)
    data = b"data" + struct.pack("<I", frames * 2 & 0xFFFFFFFF) + bytes(range(100))
    return b"RIFF" + struct.pack("<I", 4 + len(form) + len(data)) + b"WAVE" + form + data


def bomb(width: int, height: int) -> Change:
    """Return a change of the size of a PNG image."""
    import zlib

    def change(content: bytes) -> bytes:
        body = b"IHDR" + struct.pack(">II", width, height) + content[24:29]
        return content[:12] + body + struct.pack(">I", zlib.crc32(body)) + content[33:]

    return change


def rows_of(columns: int) -> Change:
    """Return a change of the row length of a quantized GGUF tensor."""
    return lambda content: content.replace(struct.pack("<IQQ", 2, 64, 3), struct.pack("<IQQ", 2, columns, 3))


def no_characters(content: bytes) -> bytes:
    """Return the arrays with a text of a number that is no character."""
    import io

    import numpy as np

    buffer = io.BytesIO()
    with np.load(io.BytesIO(content)) as arrays:
        changed = dict(arrays) | {"t": np.full(1, 2**31 - 1, "<u4").view("<U1")}
    np.savez(buffer, **changed)
    return buffer.getvalue()


File = tuple[str, int, str]
"""Kind of input, number of its seed, and name of the file."""
RECIPE0 = ("recipe", 0, "recipe.yaml")
RECIPE1 = ("recipe", 1, "recipe.yaml")
SUITE = ("suite", 0, "suite.yaml")
POLICY = ("policy", 0, "policy.yaml")
MODEL_GGUF = ("gguf", 0, "model.gguf")
MODEL_GGUF1 = ("gguf", 1, "model.gguf")
MODEL_OPENVINO = ("openvino", 0, "model.xml")
MODEL_SAFETENSORS_INDEX = ("safetensors-index", 0, "model.safetensors.index.json")
CONFIG_OF_CONFIG = ("config", 0, "config.json")
TOKENIZER = ("tokenizer", 1, "tokenizer.json")
TOKENIZER2 = ("tokenizer", 2, "tokenizer.json")
TOKENIZER0 = ("tokenizer", 0, "tokenizer.json")
GENERATION_CONFIG = ("generation-config", 0, "generation_config.json")
GENERATION_CONFIG1 = ("generation-config", 1, "generation_config.json")
CONFIG_OF_GENERATION_CONFIG = ("generation-config", 0, "config.json")
CONFIG_OF_QUANTIZATION_CONFIG = ("quantization-config", 0, "config.json")
QUANTIZED_TABLES = ("quantization-config", 0, "quantized_tables.safetensors")
ADAPTER_CONFIG = ("adapter", 0, "adapter_config.json")
PREPROCESSOR_CONFIG = ("preprocessor", 2, "preprocessor_config.json")
SENTENCE_BERT_CONFIG = ("sentence-modules", 0, "sentence_bert_config.json")
CONFIG_OF_SENTENCE_MODULES = ("sentence-modules", 0, "2_Dense/config.json")
GRAPH_INPUTS = ("graph-inputs", 1, "graph_inputs.json")
GRAPH_INPUTS0 = ("graph-inputs", 0, "graph_inputs.json")
ARRAYS0 = ("graph-inputs", 0, "arrays.npz")
ARRAYS = ("graph-inputs", 1, "arrays.npz")
README = ("model-card", 0, "README.md")
ROWS_TSV = ("tsv", 0, "rows.tsv")
ROWS_JSON = ("json", 0, "rows.json")
ROWS_JSONL = ("jsonl", 0, "rows.jsonl")
OBJECTS = ("annotations", 0, "objects.json")
MASK = ("annotations", 0, "mask.png")
IMAGE = ("image", 0, "image")
RECORDING = ("audio", 0, "recording")
BUNDLE = ("bundle-zip", 0, "bundle.zip")
MANIFEST = ("bundle", 0, "bundle/manifest.json")
CONFIG_OF_BUNDLE = ("bundle", 0, "bundle/model/config.json")
PROVENANCE = ("provenance", 0, "provenance.json")
LEDGER = ("search-ledger", 0, "ledger.jsonl")
PARQUET = ("parquet", 2, "rows.parquet")
REQUESTS = ("traffic", 0, "requests.jsonl")
REPORT = ("report", 2, "report.json")
BASELINE = ("baseline", 0, "baseline.json")
HISTORY = ("night-history", 0, "history.sqlite")

CASES: dict[str, tuple[File, Change, str | None]] = {
    # name: (file, change, message; None where the file is read)
    "a name that is half a character": (RECIPE0, text('"baseline"', '"\\ud800"'), "surrogate"),
    "a name too long": (RECIPE1, text('"prompts": 4', f'"questions": "{"x" * 300}"'), None),
    "a recipe with a name too long": (SUITE, text("a.yaml", "x" * 300 + "/y.yaml"), "no file lies"),
    "100,000 values": (POLICY, whole("rules: [" + "1," * 100_000 + "]"), "too many"),
    "an alignment that is no number": (
        MODEL_GGUF,
        gguf_key("general.alignment", 7, b"\1"),
        "unexpected type",
    ),
    "a key twice": (MODEL_GGUF, gguf_key("general.architecture", 4, bytes(4)), "occurs twice"),
    "rows of part of a block": (MODEL_GGUF1, rows_of(33), "no multiple of 32"),
    "a constant without a type": (MODEL_OPENVINO, text('element_type="f32"', 'element_type=""'), None),
    "an index that leads nowhere": (
        MODEL_SAFETENSORS_INDEX,
        text("model-00001", "\\u0000"),
        "",
    ),
    "half a character": (MODEL_SAFETENSORS_INDEX, text("model-00001", "\\ud800"), ""),
    "text_config that is a number": (
        CONFIG_OF_CONFIG,
        fields(vocab_size=None, text_config=1.5),
        "unexpected type",
    ),
    "a vocabulary of texts": (TOKENIZER, text('"id": 0', '"id": true'), "cannot be loaded"),
    "tokens that are a number": (TOKENIZER0, fields(added_tokens=1.5), "unexpected type"),
    "ends that are a number": (
        GENERATION_CONFIG,
        fields(eos_token_id=1.5),
        "unexpected type",
    ),
    "a length that is a text": (
        GENERATION_CONFIG,
        fields(max_new_tokens="a"),
        "unexpected",
    ),
    "a penalty that is a list": (
        GENERATION_CONFIG,
        fields(length_penalty=[1]),
        "unexpected",
    ),
    "suppressed texts": (GENERATION_CONFIG1, fields(suppress_tokens=["a"]), "unexpected"),
    "a text_config that is a list": (CONFIG_OF_GENERATION_CONFIG, fields(text_config=[1]), "unexpected"),
    "no bits": (CONFIG_OF_QUANTIZATION_CONFIG, quantization(bits=None), "do not fit together"),
    "bits of a text": (CONFIG_OF_QUANTIZATION_CONFIG, quantization(bits="4"), "has '4' bits"),
    "a group of none": (CONFIG_OF_QUANTIZATION_CONFIG, quantization(group_size=0), "group_size of 0"),
    "no pattern": (CONFIG_OF_QUANTIZATION_CONFIG, quantization(dynamic={"(": {}}), "no regular expression"),
    "a broken table": (
        QUANTIZED_TABLES,
        whole(b"x" * 99),
        "truncated or broken",
    ),
    "Megatron": (
        ADAPTER_CONFIG,
        fields(megatron_config={"a": 1}, megatron_core="this"),
        "Megatron",
    ),
    "a rank of a billion": (ADAPTER_CONFIG, fields(r=10**9), "the rank is"),
    "slow targets": (ADAPTER_CONFIG, fields(target_modules=r"(\w+\.?)+!"), "repeats a group"),
    "a layout of a number": (ADAPTER_CONFIG, fields(layers_to_transform="x"), ""),
    "filters of petabytes": (PREPROCESSOR_CONFIG, fields(num_mel_bins=2**53), "num_mel_bins"),
    "a length of a text": (
        SENTENCE_BERT_CONFIG,
        fields(max_seq_length="x"),
        "max_seq_length",
    ),
    "a broken module config": (SENTENCE_BERT_CONFIG, whole(b"\xc0"), "not valid JSON"),
    "a list of an activation": (CONFIG_OF_SENTENCE_MODULES, fields(activation_function=[1]), ""),
    "a shape of gigabytes": (
        GRAPH_INPUTS,
        text("[2, 3]", "[99999999, 99999999]"),
        "not as it was",
    ),
    "a limit of 0": (GRAPH_INPUTS0, text('"below": 9', '"below": 0'), "not as it was"),
    "a hundred axes": (GRAPH_INPUTS, text("[2, 3]", f"{[1] * 100}"), "not as it was"),
    "a type of a record": (GRAPH_INPUTS, text('"float32"', '"i4,i4"'), "not as it was"),
    "a name of null": (GRAPH_INPUTS, text('"name": "x"', '"name": null'), "not as it was"),
    "an array of no header": (ARRAYS, text("{'descr'", "{('escr'"), "cannot be read"),
    "a deep card": (README, text("license: other", f"license: {'[' * 3000}"), "no YAML"),
    "rows of digits": (ROWS_JSON, whole(f'[{{"text": {DIGITS}}}]'), "is not JSON"),
    "a deep line": (ROWS_JSONL, whole(DEEP), "not JSON"),
    "deep boxes": (OBJECTS, whole(DEEP), ""),
    "a box of digits": (OBJECTS, text("4.5", "9" * 400), "is not four numbers"),
    "a mask of gigapixels": (MASK, bomb(100_000, 100_000), ""),
    "an image of gigapixels": (IMAGE, bomb(100_000, 100_000), "too large"),
    "billions of samples": (RECORDING, whole(wav(2**31 - 1, 50)), "its rate is 2,147,483,647 Hz"),
    "an entry without a name": (BUNDLE, nameless_member, "is refused"),
    "labels of half a character": (
        MANIFEST,
        text('"name": "', '"name": "\\ud800'),
        "no Unicode",
    ),
    "labels of a list": (CONFIG_OF_BUNDLE, fields(id2label=[1, 2]), ""),
    "labels without numbers": (CONFIG_OF_BUNDLE, fields(id2label={"x": "a"}), ""),
    "a statement of lists": (PROVENANCE, text("model/config.json", "x" * 5000), "is missing"),
    "outcomes without a count": (LEDGER, text("bits:2:", "bits:"), "ledger cannot be read"),
    "outcomes of terabytes": (
        LEDGER,
        text("bits:2:", "bits:9999999999999:"),
        "ledger cannot",
    ),
    "a missing column": (HISTORY, statement("ALTER TABLE nights RENAME started TO x"), ""),
    "sizes of a column that pyarrow cannot read without a crash": (
        PARQUET,
        lambda content: content[:525] + b"\3" + content[526:],
        "pyarrow crashes",
    ),
    "a report of half a character": (REPORT, text('"recipe": "r"', '"recipe": "\\ud800r"'), "unpaired surrogate"),
    "a column with a name of 100,000 characters": (ROWS_TSV, text("label", "label" * 20_000), "characters"),
    "a scale of an adapter that overflows": (ADAPTER_CONFIG, fields(lora_alpha=1e40), "cannot be merged"),
    "a text of numbers that are no characters": (ARRAYS0, no_characters, "cannot be read as"),
    "a time of 400 digits": (REQUESTS, text("12.5", "1" + "0" * 400), "no time of arrival"),
    "a prefix of subwords of which Rust code panics": (
        TOKENIZER2,
        text('"continuing_subword_prefix": null', '"continuing_subword_prefix": "auto"'),
        "cannot be loaded",
    ),
    "a memory that is a list": (
        BASELINE,
        text('"memory_bytes": ', '"memory_bytes": [1], "x": '),
        "a number for memory",
    ),
    "a time beyond all measures": (BASELINE, text('"low": 5656', '"low": 1e300, "x": 5656'), "below 1e"),
    "a time with a negative bound": (BASELINE, text('"low": 5656', '"low": -5656'), None),
}


@functools.cache
def seeds(kind: str) -> list[dict[str, bytes]]:
    """Return the valid folders of a kind."""
    return load_seeds(KINDS[kind])


@pytest.mark.parametrize("case", CASES)
def test_file_ends_with_an_error_about_it(case: str, tmp_path: Path) -> None:
    (kind, number, name), change, message = CASES[case]
    files: Mapping[str, bytes] = seeds(kind)[number]
    for path, content in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(content)
    assert KINDS[kind].read(tmp_path) is not NotImplemented
    changed = change(files[name])
    (tmp_path / name).write_bytes(changed)
    assert changed != files[name]
    finish = KINDS[kind].finish
    if finish is not None:
        finish(tmp_path, name)
    if message is None:
        assert read_case(KINDS[kind], tmp_path)
        return
    error = _error_of(kind, tmp_path)
    assert re.search(re.escape(message), error), error


def _error_of(kind: str, folder: Path) -> str:
    from compress.utils.errors import CompressError

    assert not read_case(KINDS[kind], folder)
    try:
        KINDS[kind].read(folder)
    except CompressError as error:
        return str(error)
    raise AssertionError("the file was accepted")


def test_rollback_of_what_is_no_alias_is_refused(tmp_path: Path) -> None:
    from compress.plugins.registry.state import State
    from compress.utils.errors import InputError

    state = State()
    when = {"at": "2026-01-01T00:00:00+00:00", "who": "a"}
    from compress.plugins.registry.state import ENTRY

    for body in (
        {"kind": "began", **when},
        {"kind": "registered", "name": "m", "version": 1, "record": "0" * 64, "run": "r", **when},
    ):
        state.apply(ENTRY.validate_python(body))
    for selector in ("latest", "1"):
        with pytest.raises(InputError, match=f"'{selector}' is no alias of m"):
            state.previous("m", selector)


def _field(number: int, content: bytes | int) -> bytes:
    """Return a field of a protobuf message: bytes shorter than 128, or an integer below 128."""
    if isinstance(content, int):
        return bytes([number << 3, content])
    return bytes([number << 3 | 2, len(content)]) + content


def _initializer(dimensions: bytes) -> bytes:
    return _field(7, _field(5, dimensions + _field(2, 1) + _field(8, b"w") + _field(9, bytes(8))))


TENSOR = _field(1, 2) + _field(2, 1) + _field(9, bytes(8))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        # Eight bytes where sizes are expected: a reader of protobuf ignores them.
        (_initializer(_field(1, 2) + b"\x09" + bytes([1, 2, 3, 4, 5, 6, 7, 8])), None),
        (_initializer(b"\x08" + b"\xff" * 9 + b"\x01"), "negative size"),
        # A reader of protobuf joins both tensors to one.
        (_field(7, _field(1, _field(5, _field(5, TENSOR) + _field(5, TENSOR)))), "one field twice"),
    ],
)
def test_onnx_file_is_read_as_protobuf_reads_it(tmp_path: Path, content: bytes, message: str | None) -> None:
    from fuzzing.references import compare_onnx

    from compress.inspection.tensors import read_model
    from compress.utils.errors import ModelError

    (tmp_path / "model.onnx").write_bytes(content)
    if message is None:
        contents = read_model(tmp_path / "model.onnx")
        assert contents.tensors[0].shape == (2,)
        compare_onnx(tmp_path, contents)
        return
    with pytest.raises(ModelError, match=message):
        read_model(tmp_path / "model.onnx")
