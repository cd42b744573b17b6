"""The shape of a model: parameters by sort, from names and shapes in file headers alone."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from compress.checkpoints.checks import check_model_folder, weight_files
from compress.checkpoints.json_file import read_json
from compress.checkpoints.safetensors_file import read_header
from compress.formats.gguf.read import read_gguf
from compress.stage.prediction import Shape

_LAYER = re.compile(r"(?:^|\.)(\d+)\.")
_EMBEDDING = re.compile(r"embed|embd|wte|wpe")
_ATTENTION = re.compile(r"att")


def read_shape(path: Path) -> Shape:
    """The shape of a model folder or GGUF file. Raises `ModelError` for what is no whole, safe model."""
    if path.is_dir() and not (path / "config.json").is_file() and len(found := list(path.glob("*.gguf"))) == 1:
        path = found[0]
    if path.is_file():
        header = read_gguf(path)
        architecture = str(header.metadata.get("general.architecture", ""))
        sizes = {name: header.metadata.get(f"{architecture}.{key}") for name, key in _GGUF_SIZES.items()}
        return count(((tensor.name, tensor.shape) for tensor in header.tensors), sizes, 0)
    check_model_folder(path)
    files = weight_files(path)
    processor = sum(file.stat().st_size for file in path.rglob("*") if file.is_file() and file not in files)
    tensors = [tensor for file in files for tensor in read_header(file)]
    return count(((tensor.name, tensor.shape) for tensor in tensors), read_json(path / "config.json"), processor)


_GGUF_SIZES = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
}


def count(tensors: Iterable[tuple[str, tuple[int, ...]]], config: dict[str, Any], processor_bytes: int) -> Shape:
    """Sort tensors by name: tables, attention, the rest of a numbered layer, and everything else."""
    sums = dict.fromkeys(("embeddings", "attention", "feed_forward", "other"), 0)
    layers: set[int] = set()
    for name, shape in tensors:
        layer = _LAYER.search(name)
        if layer:
            layers.add(int(layer[1]))
        if not layer and len(shape) == 2 and _EMBEDDING.search(name):
            sort = "embeddings"
        elif layer:
            sort = "attention" if _ATTENTION.search(name) else "feed_forward"
        else:
            sort = "other"
        sums[sort] += math.prod(shape)
    return Shape(
        **sums,
        layers=len(layers),
        hidden=_size(config, "hidden_size"),
        intermediate=_size(config, "intermediate_size"),
        heads=_size(config, "num_attention_heads"),
        processor_bytes=processor_bytes,
    )


def _size(config: dict[str, Any], name: str) -> int:
    value = config.get(name)
    return value if isinstance(value, int) and value > 0 else 0
