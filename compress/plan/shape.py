"""How many parameters a model has and of which sort, from names and shapes in file headers alone."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from compress.checkpoints.checks import check_model_folder, read_json, weight_files
from compress.checkpoints.safetensors_file import read_header
from compress.errors import ModelError
from compress.formats.gguf.read import read_gguf
from compress.stages.distill import Distill, Student
from compress.stages.prune import Prune

_LAYER = re.compile(r"(?:^|\.)(\d+)\.")
_EMBEDDING = re.compile(r"embed|embd|wte|wpe")
_ATTENTION = re.compile(r"att")
_SIZES = {"hidden_size": "hidden", "intermediate_size": "intermediate", "num_hidden_layers": "layers"}
_SIZELESS = re.compile(r"dropout|hidden_act|initializer|num_attention_heads|label|eps|pad_token_id")


@dataclass(frozen=True)
class Shape:
    """Parameters by sort, and the sizes that memory depends on (0 where they are not known).

    ``processor_bytes``: tokenizer and other files beside the weights.
    """

    embeddings: float
    attention: float
    feed_forward: float
    other: float
    layers: int
    hidden: int = 0
    intermediate: int = 0
    heads: int = 0
    processor_bytes: int = 0

    @property
    def parameters(self) -> float:
        """All parameters."""
        return self.embeddings + self.working

    @property
    def working(self) -> float:
        """Parameters that multiply every token: all but the embedding tables."""
        return self.attention + self.feed_forward + self.other


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


def student_shape(stage: Distill, shape: Shape) -> Shape | None:
    """What `distill` trains, given its input; ``None`` where that is another model or cannot be told."""
    student = stage.student
    if student is None:
        return shape
    if student.layers is not None:
        return _with_layers(shape, len(student.layers))
    return _reconfigured(shape, student) if student.config is not None else None


def pruned_shape(stage: Prune, shape: Shape) -> Shape | None:
    """What `prune` leaves; ``None`` where channels go. Raises `ModelError` if it would leave no layer."""
    if stage.cuts_channels:
        return None
    if stage.layers and stage.layers >= shape.layers > 0:
        raise ModelError(f"prune removes {stage.layers} layers of a model that has {shape.layers}.")
    kept = _with_layers(shape, shape.layers - stage.layers)
    return replace(
        kept,
        attention=kept.attention * (1 - stage.heads),
        feed_forward=kept.feed_forward * (1 - stage.feed_forward),
        intermediate=round(kept.intermediate * (1 - stage.feed_forward)),
    )


def _with_layers(shape: Shape, layers: int) -> Shape:
    share = layers / shape.layers if shape.layers else 1.0
    return replace(shape, layers=layers, attention=shape.attention * share, feed_forward=shape.feed_forward * share)


def _reconfigured(shape: Shape, student: Student) -> Shape | None:
    """Scale each sort as its matrices do: hidden^2 for attention, hidden x intermediate for feed-forward."""
    changes = student.config or {}
    known = all(name in _SIZES or _SIZELESS.search(name) for name in changes)
    sized = {_SIZES[name]: value for name, value in changes.items() if name in _SIZES}
    if not known or not all(isinstance(value, int) and value > 0 for value in sized.values()):
        return None
    if not (shape.hidden and shape.intermediate and shape.layers):
        return None
    wide = replace(shape, **sized)
    hidden, middle = wide.hidden / shape.hidden, wide.intermediate / shape.intermediate
    layers = wide.layers / shape.layers
    return replace(
        wide,
        embeddings=shape.embeddings * hidden,
        attention=shape.attention * layers * hidden**2,
        feed_forward=shape.feed_forward * layers * hidden * middle,
        other=shape.other * hidden**2,
    )
