"""Size budget of a model: bytes and parameters by module, layer and type, and bytes that are not weights."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from compress.formats.graph_value import GraphValue
from compress.formats.registry import FORMATS
from compress.formats.spec import load
from compress.inspection.layers import group_layers
from compress.inspection.tensors import SUFFIXES, ModelContents, read_model
from compress.models.folder_checks import PICKLE_SUFFIXES, PROCESSOR_FILES
from compress.models.json_file import read_json
from compress.models.pipeline_folder import image_generation_hook
from compress.models.stored_tensor import StoredTensor
from compress.utils.progress import Progress, SilentProgress
from compress.utils.pydantic_models import Frozen

OUTLIER_SIGMAS = 6.0
CHUNK_ELEMENTS = 1 << 20
_INDEX = re.compile("[0-9]{1,9}")
_DEEPEST = 64
"""Levels of modules at most; a foreign name may have thousands of dots."""


class WeightStatistics(Frozen):
    """Statistics of a tensor's finite values: stored integers in quantized ONNX, dequantized values in GGUF."""

    sparsity: float = Field(description="share of values that are exactly zero")
    minimum: float
    maximum: float
    mean: float
    std: float = Field(description="population standard deviation")
    outliers: float = Field(description="share of values more than 6 standard deviations from the mean")
    not_finite: int = Field(description="number of NaN and infinite values")


def measure_weights(contents: ModelContents, progress: Progress) -> dict[str, WeightStatistics]:
    """Return the statistics of every weight by name, except packed and sub-byte ones."""
    weights = [tensor for tensor in contents.tensors if tensor.role == "weight" and not tensor.tied_to]
    readable = [item for item in weights if item.readable and item.elements > 0 and "complex" not in item.dtype]
    tracked = progress.track(readable, "reading weights", len(readable))
    return {tensor.name: describe(tensor.values()) for tensor in tracked}


def describe(values: np.ndarray) -> WeightStatistics:
    """Return the statistics of a non-empty array, in double precision and three passes over chunks."""
    flat = values.reshape(-1)
    count = zeros = 0
    total, low, high = 0.0, math.inf, -math.inf
    # First pass: counts, sum and range.
    for piece in _finite_pieces(flat):
        count += piece.size
        zeros += piece.size - int(np.count_nonzero(piece))
        total += float(piece.sum())
        if piece.size:
            low, high = min(low, float(piece.min())), max(high, float(piece.max()))
    if not count:
        low = high = math.nan
    size = count or 1
    mean = total / count if count else math.nan
    # Second pass: deviations from the mean, which avoids cancellation.
    std = math.sqrt(sum(float(np.square(piece - mean).sum()) for piece in _finite_pieces(flat)) / size)
    # Third pass: outliers.
    far = sum(int(np.count_nonzero(np.abs(piece - mean) > OUTLIER_SIGMAS * std)) for piece in _finite_pieces(flat))
    return WeightStatistics(
        sparsity=zeros / size,
        minimum=low,
        maximum=high,
        mean=mean,
        std=std if count else math.nan,
        outliers=far / size,
        not_finite=flat.size - count,
    )


def _finite_pieces(flat: np.ndarray) -> Iterator[np.ndarray[Any, np.dtype[np.float64]]]:
    for start in range(0, flat.size, CHUNK_ELEMENTS):
        piece = flat[start : start + CHUNK_ELEMENTS].astype(np.float64)
        yield piece[np.isfinite(piece)]


_TOKENIZER_FILES = (
    *PROCESSOR_FILES,
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


class Module(Frozen):
    """Module or tensor with everything below it.

    ``dtypes`` are bytes by type; ``share`` is the share of the bytes of all tensors.
    """

    name: str
    bytes: int
    parameters: int
    share: float
    dtypes: dict[str, int]
    children: tuple[Module, ...] = ()


class LayerBudget(Frozen):
    """Readable group of tensors. ``dtype`` is the type with most of its bytes."""

    name: str
    bytes: int
    parameters: int
    dtype: str


class TypeShare(Frozen):
    """Bytes and parameters stored in one type."""

    bytes: int
    parameters: int


class PartCall(Frozen):
    """One step of the denoiser for one picture without guidance, or decoding one picture, of the model's own size."""

    part: str
    parameters: int
    multiplications: int = Field(description="floating-point operations of convolutions, linear layers and attention")
    fp32_bytes: int = Field(description="peak memory: weights and live activations, with attention computed in tiles")
    fp16_bytes: int
    fp32_stored_attention_bytes: int = Field(description="peak memory with stored attention matrices")


class Budget(Frozen):
    """Distribution of a model's bytes. ``total_bytes`` = ``tensor_bytes`` + the sum of ``overhead``."""

    model: str
    format: str
    total_bytes: int = Field(description="bytes on disk of every file that belongs to the model")
    tensor_bytes: int
    overhead: dict[str, int] = Field(description="bytes on disk that are not tensors, by kind")
    parameters: int = Field(description="number of weights, without scales, zero points and constants")
    dtypes: dict[str, TypeShare]
    notes: tuple[str, ...] = ()
    layers: tuple[LayerBudget, ...]
    modules: Module
    tensors: tuple[StoredTensor, ...]
    statistics: dict[str, WeightStatistics] | None = None
    calls: tuple[PartCall, ...] | None = None
    inputs: tuple[GraphValue, ...] = Field((), description="inputs of the graphs, if the format has any")
    outputs: tuple[GraphValue, ...] = ()
    isolation: dict[str, int | bool | None] = Field({}, description="limits of the process that read the model")


def budget_of(
    path: Path, *, weights: bool = False, calls: bool = False, progress: Progress | None = None, name: str = ""
) -> Budget:
    """Return the budget of a model file or folder. Raises `ModelError`.

    Args:
        path: Model file or folder.
        weights: Read all values for statistics.
        calls: Predict the cost of a call of each part of a pipeline.
        progress: Receiver of progress.
        name: Displayed name; by default the path.
    """
    contents = read_model(path)
    # Tied tensors have 0 bytes, so that nothing counts twice.
    size, parameters = _by_type(contents.tensors)
    tensor_bytes = size.total()
    tree = _module("", [(tensor.name.split(".", _DEEPEST), tensor) for tensor in contents.tensors], tensor_bytes or 1)
    return Budget(
        model=name or str(path),
        format=contents.format,
        total_bytes=sum(file.stat().st_size for file in contents.files),
        tensor_bytes=tensor_bytes,
        overhead=_overhead(contents, tensor_bytes),
        parameters=parameters.total(),
        dtypes={kind: TypeShare(bytes=size[kind], parameters=parameters[kind]) for kind, _ in size.most_common()},
        notes=_notes(path, contents),
        layers=_layers(contents.tensors),
        modules=tree,
        tensors=contents.tensors,
        statistics=measure_weights(contents, progress or SilentProgress()) if weights else None,
        calls=image_generation_hook("component_calls")(path) if calls else None,
        **_signature(path, contents),
    )


def _signature(path: Path, contents: ModelContents) -> dict[str, tuple[GraphValue, ...]]:
    """Return the inputs and outputs of all graphs, each with its file."""
    reader = FORMATS[contents.format].signature
    if reader is None:
        return {}
    values: dict[str, list[GraphValue]] = {"inputs": [], "outputs": []}
    for file in contents.weight_files:
        # External data of a graph are weight files too.
        if file.suffix.lower() == FORMATS[contents.format].suffix:
            relative = file.relative_to(path).as_posix() if path.is_dir() else file.name
            for kind, read in load(reader)(file).items():
                values[kind] += [value.model_copy(update={"file": relative}) for value in read]
    return {kind: tuple(items) for kind, items in values.items()}


def bytes_by_layer(path: Path) -> list[dict[str, Any]]:
    """Return `{name, bytes, dtype}` of at most 40 layers in reading order, from headers. Raises `ModelError`."""
    return [layer.model_dump(include={"name", "bytes", "dtype"}) for layer in _layers(read_model(path).tensors)]


def _module(name: str, below: list[tuple[list[str], StoredTensor]], total: int) -> Module:
    """Build the tree of a module from the names of the tensors below it."""
    parts: dict[str, list[tuple[list[str], StoredTensor]]] = defaultdict(list)
    for path, tensor in below:
        if path:
            parts[path[0]].append((path[1:], tensor))
    children = [_module(part, inner, total) for part, inner in parts.items()]
    # Blocks keep their order; other children are sorted by size.
    children.sort(key=lambda child: (int(child.name), 0) if _INDEX.fullmatch(child.name) else (-1, -child.bytes))
    size, parameters = _by_type([tensor for _, tensor in below])
    return Module(
        name=name,
        bytes=size.total(),
        parameters=parameters.total(),
        share=size.total() / total,
        dtypes=dict(size.most_common()),
        children=tuple(children),
    )


def _layers(tensors: Sequence[StoredTensor]) -> tuple[LayerBudget, ...]:
    layers = []
    for name, members in group_layers(tensors).items():
        size, parameters = _by_type(members)
        most = size.most_common(1)[0][0]
        layers.append(LayerBudget(name=name, bytes=size.total(), parameters=parameters.total(), dtype=most))
    return tuple(layers)


def _by_type(tensors: Sequence[StoredTensor]) -> tuple[Counter[str], Counter[str]]:
    """Return bytes and parameters of each type."""
    size: Counter[str] = Counter()
    parameters: Counter[str] = Counter()
    for tensor in tensors:
        size[tensor.dtype] += tensor.bytes
        parameters[tensor.dtype] += tensor.parameters
    return size, parameters


def _overhead(contents: ModelContents, tensor_bytes: int) -> dict[str, int]:
    # Weight files contain headers or graphs in addition to tensors.
    around = "graph" if FORMATS[contents.format].has_graph else "header"
    overhead = Counter({around: -tensor_bytes})
    for file in contents.files:
        if file in contents.weight_files:
            kind = around
        elif file.name in _TOKENIZER_FILES or file.suffix == ".model":
            kind = "tokenizer"
        elif file.suffix in PICKLE_SUFFIXES or file.suffix in SUFFIXES:
            kind = "other weights"
        else:
            kind = "configuration" if file.suffix == ".json" else "other files"
        overhead[kind] += file.stat().st_size
    return dict(overhead.most_common())


def _notes(path: Path, contents: ModelContents) -> tuple[str, ...]:
    notes = [f"{item.origin} shares the bytes of {item.tied_to}" for item in contents.tensors if item.tied_to]
    config = path / "config.json"
    if contents.format == "safetensors" and config.is_file() and read_json(config).get("tie_word_embeddings") is True:
        # A tied head without a stored tensor is easily overlooked.
        heads = [tensor.name for tensor in contents.tensors if tensor.name.startswith(("lm_head.", "cls.predictions"))]
        notes += [] if heads else ["tie_word_embeddings: an output layer, if there is one, uses the embedding table"]
    return tuple(notes)


Stored = Mapping[str, tuple[str, tuple[int, ...], int]]
"""Type, shape and bytes of each stored tensor by name."""


def size_advice(stored: Stored, model_bytes: int, runtime_bytes: int, most: int) -> list[str]:
    """Return stages and options that shrink a model with these tensors, or reasons why none would; never empty.

    Args:
        stored: Stored tensors.
        model_bytes: Bytes of the model that count, compressed or not.
        runtime_bytes: Bytes of the runtime that count.
        most: Limit of both together.
    """
    advice = []
    total_bytes = sum(size for *_, size in stored.values()) or 1
    # Float weights can be quantized.
    floats = sum(size for kind, _, size in stored.values() if kind.lower() in ("float32", "f32")) / total_bytes
    if floats > 0.5:
        advice.append(f"{floats:.0%} of the weights are float32: the stage onnx_int8 makes them four times smaller")
    # One large tensor is usually an embedding.
    if stored:
        name, (_, shape, size) = max(stored.items(), key=lambda item: item[1][2])
        if size > total_bytes / 4 and len(shape) >= 2:
            share = f"the largest tensor, {name} {list(shape)}, is {size / total_bytes:.0%} of them"
            advice.append(
                f"{share}: for an embedding, trim_vocabulary (a higher min_count) or quantize: {{embedding_bits: 4}}"
            )
    if runtime_bytes > most:
        advice.append(f"the runtime alone has {runtime_bytes} bytes, so that no model fits")
    elif model_bytes > most / 2:
        advice.append("a smaller student (distill, prune) may save the rest")
    return advice or ["a larger budget"]
