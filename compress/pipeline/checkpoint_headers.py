"""Sizes of models and data files, read from headers, metadata or the first lines."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from compress.data.arrays import INPUTS, array_files
from compress.data.files import LABEL, read_class_folder
from compress.formats.gguf.model import read_gguf
from compress.formats.onnx.stored_tensors import read_tensors
from compress.models.folder_checks import check_model_folder, weight_files
from compress.models.json_file import read_json
from compress.models.pipeline_folder import is_pipeline
from compress.models.safetensors_file import read_header
from compress.sources.onnx_file import onnx_file
from compress.stages.cost_model import Shape, Text
from compress.utils.errors import DataError

_HEAD_BYTES = 1 << 16


def read_size(path: Path) -> tuple[Text, tuple[str, ...]]:
    """Return rows and bytes of a data file or class folder, and its column names if known. Raises `DataError`."""
    if path.is_dir() and (files := array_files(path)):
        return Text(len(files), folder_bytes(path)), (INPUTS,)
    if path.is_dir():
        rows = read_class_folder(path, (LABEL,))
        return Text(len(rows.columns[LABEL]), folder_bytes(path)), rows.names
    try:
        text, columns = _parquet_size(path) if path.suffix == ".parquet" else _text_size(path)
    except OSError as error:
        raise DataError(f"{path.name} cannot be read: {error.strerror or error}.", where=str(path)) from error
    if text.rows < 1:
        problem = "has columns and no rows" if columns else "is empty"
        raise DataError(f"{path.name} {problem}.", where=str(path), expected="at least one row")
    return text, columns


def _text_size(path: Path) -> tuple[Text, tuple[str, ...]]:
    """Estimate the rows of a text file from its first lines."""
    size = path.stat().st_size
    with path.open("rb") as file:
        # To the end of a line: a document may be longer than the beginning that is read.
        # Up to the end of a line, since one document may be longer than the head.
        head = file.read(_HEAD_BYTES) + file.readline()
    text = head.decode("utf-8-sig", errors="replace")
    if path.suffix == ".json":
        rows_in_head = text.count("}")
    else:
        rows_in_head = text.count("\n") if size > len(head) else len(text.splitlines())
    columns = _columns(path.suffix, text)
    rows = round(rows_in_head * size / max(len(head), 1)) - bool(columns and path.suffix == ".csv")
    return Text(rows, size), columns


def _columns(suffix: str, head: str) -> tuple[str, ...]:
    """Return the column names in the first line of a CSV or JSONL file."""
    if suffix == ".csv":
        return tuple(next(csv.reader(io.StringIO(head)), ()))
    if suffix == ".jsonl":
        try:
            first = json.loads(head.split("\n", 1)[0])
        except ValueError:
            return ()
        return tuple(first) if isinstance(first, dict) else ()
    return ()


def _parquet_size(path: Path) -> tuple[Text, tuple[str, ...]]:
    """Return rows, uncompressed bytes and columns of a Parquet file from its metadata."""
    import pyarrow as pa
    import pyarrow.parquet

    if path.stat().st_size == 0:
        return Text(0, 0), ()
    try:
        metadata = pyarrow.parquet.read_metadata(path)
    except pa.ArrowInvalid as error:
        raise DataError(f"{path.name} is no whole Parquet file: {error}", where=str(path)) from error
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    uncompressed = sum(group.total_byte_size for group in groups)
    return Text(metadata.num_rows, uncompressed), tuple(metadata.schema.to_arrow_schema().names)


def folder_bytes(path: Path) -> int:
    """Return the bytes of all files below a folder, or of a file."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


_LAYER = re.compile(r"(?:^|\.)(\d+)\.")
_EMBEDDING = re.compile(r"embed|embd|wte|wpe")
_ATTENTION = re.compile(r"att")


def read_shape(path: Path) -> Shape:
    """Return the shape of a model folder, or of a GGUF or ONNX file. Raises `ModelError` if it is damaged or unsafe."""
    if path.is_dir() and not (path / "config.json").is_file() and len(gguf_files := list(path.glob("*.gguf"))) == 1:
        path = gguf_files[0]
    if (graph := onnx_file(path)) is not None:
        stored = read_tensors(graph, graph.parent)
        return count(((tensor.name, tensor.shape) for tensor in stored if tensor.role == "weight"), {}, 0)
    if path.is_file():
        header = read_gguf(path)
        architecture = str(header.metadata.get("general.architecture", ""))
        sizes = {name: header.metadata.get(f"{architecture}.{key}") for name, key in _GGUF_SIZES.items()}
        return count(((tensor.name, tensor.shape) for tensor in header.tensors), sizes, 0)
    check_model_folder(path)
    files = weight_files(path)
    processor = sum(file.stat().st_size for file in path.rglob("*") if file.is_file() and file not in files)
    tensors = [tensor for file in files for tensor in read_header(file)]
    config = {} if is_pipeline(path) else read_json(path / "config.json")
    return count(((tensor.name, tensor.shape) for tensor in tensors), config, processor)


_GGUF_SIZES = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
}


def count(tensors: Iterable[tuple[str, tuple[int, ...]]], config: dict[str, Any], processor_bytes: int) -> Shape:
    """Sort tensors by name into embeddings, attention, other layer weights and the rest, and sum their parameters."""
    sums = dict.fromkeys(("embeddings", "attention", "feed_forward", "other"), 0)
    layers: set[int] = set()
    num_tensors = 0
    for name, shape in tensors:
        num_tensors += 1
        layer = _LAYER.search(name)
        if layer:
            layers.add(int(layer[1]))
        if not layer and len(shape) == 2 and _EMBEDDING.search(name):
            group = "embeddings"
        elif layer:
            group = "attention" if _ATTENTION.search(name) else "feed_forward"
        else:
            group = "other"
        sums[group] += math.prod(shape)
    return Shape(
        **sums,
        layers=len(layers),
        hidden=_size(config, "hidden_size"),
        intermediate=_size(config, "intermediate_size"),
        heads=_size(config, "num_attention_heads"),
        processor_bytes=processor_bytes,
        tensors=num_tensors,
    )


def _size(config: dict[str, Any], name: str) -> int:
    """Return a positive size of the config, or 0."""
    value = config.get(name)
    return value if isinstance(value, int) and value > 0 else 0
