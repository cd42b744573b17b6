"""Writer of GGUF files, and comparison of a file with the checkpoint that it was written from.

The layout is that of llama.cpp's own converter (convert_hf_to_gguf.py). Quantized integers stay unchanged. One
tensor is in memory at a time. The experts of a block form one tensor, whose type holds the widest of them.
"""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from compress.formats.gguf.architecture import GgufArchitecture, NamedTensor
from compress.formats.gguf.blocks import block_type, check_blocks, pack_blocks, quantize_rows, row_bytes
from compress.formats.gguf.file_types import FILE_TYPES, TensorTypes
from compress.formats.gguf.tokenizer import add_tokenizer
from compress.models.checkpoint import Checkpoint
from compress.models.folder_checks import PROCESSOR_FILES
from compress.models.lora_adapter import ADAPTER
from compress.models.safetensors_file import read_imatrix
from compress.utils.errors import ModelError

_ALSO = ("merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "generation_config.json")
FloatType = Literal["f16", "f32"]
_FLOAT_FILES = {"F32": 0, "F16": 1}
"""llama.cpp's numbers of file types that contain floats only (llama_ftype)."""
_LONGEST_BLOCK = 256


@dataclass(frozen=True)
class GgufTypes:
    """Types of the tensors that are written.

    Attributes:
        floats: Type of matrices that are not quantized.
        file_type: File type of llama.cpp by whose rules floats are rounded, with the checkpoint's importance matrix.
    """

    floats: FloatType = "f16"
    file_type: str | None = None


EXACT_TYPES = GgufTypes()
"""GgufTypes that keep integers exactly and store the rest in float16."""


@dataclass(frozen=True)
class PlannedTensor:
    """Tensor to write.

    Attributes:
        name: Name in the file.
        source: Name in the checkpoint, or None for a computed tensor.
        kind: Type in the file.
        shape: Shape in torch's order.
        order: Source rows in the file's order, or None for an unchanged order.
        data: Function that returns bytes [rows, bytes of a row] of a quantized tensor, or values of ``shape``.
        parts: Tensors that are stacked in this one.
        values: Function that transforms a float source.
    """

    name: str
    source: str | None
    kind: str
    shape: tuple[int, ...]
    order: np.ndarray | None
    data: Callable[[], np.ndarray]
    parts: tuple[PlannedTensor, ...] = ()
    values: Callable[[Any], Any] | None = None


class _CheckedArray(np.ndarray[Any, np.dtype[Any]]):
    """Array whose `tofile` raises an error when the disk is full; numpy only reports that it wrote too little."""

    def tofile(self, file: BinaryIO) -> None:  # type: ignore[override]
        """Write all bytes; raise the system's error on failure."""
        file.write(self.data)


def plan_gguf(checkpoint: Checkpoint, types: GgufTypes = EXACT_TYPES) -> list[PlannedTensor]:
    """Return every tensor that `write_gguf` writes, in file order.

    Raises `ModelError` for an architecture, a tensor or a quantization that GGUF cannot hold.
    """
    if (checkpoint.folder / ADAPTER).is_dir():
        raise ModelError(
            "The checkpoint has an adapter, which GGUF keeps in a file of its own.",
            where=str(checkpoint.folder / ADAPTER),
            expected="a checkpoint without an adapter",
            hint="leave out the stage that adds it, or merge the adapter before quantization with merge_lora",
        )
    architecture = GgufArchitecture.of(checkpoint)
    # Raise `ModelError` for a missing module and for a module that would be left out.
    expected_modules = {name.rpartition(".")[0] for name in architecture.shapes}
    read_tensors = (name for name in checkpoint.files if not architecture.is_ignored(name))
    stored_modules = {name.rpartition(".")[0] for name in read_tensors} - (architecture.tied - expected_modules)
    missing, unknown = sorted(expected_modules - stored_modules), sorted(stored_modules - expected_modules)
    if missing or unknown:
        what = f"lacks {', '.join(missing[:3])}" if missing else f"has {', '.join(unknown[:3])}"
        raise ModelError(
            f"The checkpoint {what}{' and more' if len(missing or unknown) > 3 else ''}, which is not how a "
            f"{architecture.config.model_type} is made.",
            where=str(checkpoint.folder),
            expected="the modules of transformers' own class, no more and no fewer",
        )
    named = architecture.tensors()
    # Only file types of llama.cpp are rounded with the importance matrix.
    imatrix = {} if types.file_type is None else read_imatrix(checkpoint.folder)
    rules = None
    if types.file_type is not None:
        metadata = architecture.metadata()
        heads, shared = metadata["attention.head_count"], metadata["attention.head_count_kv"]
        rules = TensorTypes(
            types.file_type,
            [tensor.name for tensor in named],
            metadata["block_count"],
            heads / shared if heads and shared else 1.0,
            metadata.get("expert_count", 0),
            bool(imatrix),
        )
    plan = _Plan(checkpoint, architecture, types, rules, imatrix)
    return [plan.tensor(tensor) for tensor in named] + [
        PlannedTensor(name, None, "F32", factors.shape, None, partial(np.asarray, factors))
        for name, factors in architecture.factors().items()
    ]


def write_gguf(checkpoint: Checkpoint, file: Path, types: GgufTypes = EXACT_TYPES) -> None:
    """Write a checkpoint with its tokenizer to ``file``, as `plan_gguf` plans it.

    Raises `ModelError` for a checkpoint that GGUF cannot hold, before anything is written.
    """
    import gguf

    planned = plan_gguf(checkpoint, types)
    architecture = GgufArchitecture.of(checkpoint)
    writer = gguf.GGUFWriter(file, architecture.name)
    writer.add_type("model")
    architecture.add_metadata(writer)
    add_tokenizer(writer, checkpoint.folder, planned[0].shape[0])
    # Readers show the file type only. It is the type of most matrices.
    main_kind = Counter(tensor.kind for tensor in planned if len(tensor.shape) > 1).most_common(1)[0][0]
    numbers = (file_type.number for file_type in FILE_TYPES.values() if file_type.most == main_kind)
    file_number = FILE_TYPES[types.file_type].number if types.file_type else _FLOAT_FILES.get(main_kind)
    writer.add_file_type(file_number or next(numbers, 0))
    # The header lists all tensors before the first one is written.
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for tensor in planned:
        kind = gguf.GGMLQuantizationType[tensor.kind]
        *rows, columns = tensor.shape
        size = row_bytes(tensor.kind, columns) * math.prod(rows)
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), size, raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in planned:
            writer.write_tensor_data(np.ascontiguousarray(tensor.data()).view(_CheckedArray))
    finally:
        writer.close()


def write_companions(checkpoint: Checkpoint, folder: Path) -> None:
    """Copy the config and tokenizer files beside the GGUF file, for readers that encode text with transformers."""
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for name in (*PROCESSOR_FILES, *_ALSO):
        if (checkpoint.folder / name).is_file():
            shutil.copyfile(checkpoint.folder / name, folder / name)


@dataclass(frozen=True)
class _Plan:
    checkpoint: Checkpoint
    architecture: GgufArchitecture
    types: GgufTypes
    rules: TensorTypes | None
    imatrix: Mapping[str, Any]

    def tensor(self, tensor: NamedTensor) -> PlannedTensor:
        """Return the plan of one tensor of the file; several of the checkpoint become one [tensors, rows, columns]."""
        parts = [self._part(tensor, source) for source in tensor.sources]
        if len(parts) == 1:
            return parts[0]
        # One type must hold all experts: the widest of the types that they would have alone.
        kinds = sorted({part.kind for part in parts}, key=lambda kind: row_bytes(kind, _LONGEST_BLOCK))
        floats = {kind for kind in kinds if kind in ("F16", "F32")}
        if floats and len(kinds) > 1:
            float_source = next(part.source for part in parts if part.kind in floats)
            raise ModelError(
                f"GGUF has one type for all experts of a block, and {str(float_source).removesuffix('.weight')} is not "
                "quantized as the others are.",
                where=str(self.checkpoint.folder),
                hint="quantize all experts of a block, or none",
            )
        converted = tuple(self._part(tensor, source, kinds[-1]) for source in tensor.sources)
        shape = (len(converted), *converted[0].shape)

        def stacked() -> np.ndarray:
            return np.stack([part.data() for part in converted])

        return PlannedTensor(tensor.name, None, kinds[-1], shape, None, stacked, converted)

    def _part(self, tensor: NamedTensor, source: str, wider: str | None = None) -> PlannedTensor:
        """Return the plan of one checkpoint tensor; ``wider`` replaces the smallest type that holds its integers."""
        module, _, leaf = source.rpartition(".")
        about = _quantization(self.checkpoint, module) if leaf == "weight" else None
        if about is None:
            return self._float(tensor, source)
        if tensor.piece is not None and tensor.piece.values is not None and not tensor.piece.integers:
            raise ModelError(
                f"GGUF keeps {module} in another shape, in which its integers have no place.",
                where=str(self.checkpoint.folder),
                hint=f"leave the layer in floating point: keep: ['*.{module.rpartition('.')[2]}']",
            )
        return self._integers(tensor, module, about, wider)

    def _integers(
        self, tensor: NamedTensor, module: str, about: tuple[int, int, bool, tuple[int, int]], wider: str | None
    ) -> PlannedTensor:
        bits, group_size, symmetric, shape = about
        where = f"{module} of {self.checkpoint.folder}"
        check_blocks(shape[1], shape[1] if group_size == -1 else group_size, where)
        kind, order = wider or block_type(bits, symmetric, where), self._order(tensor, shape[0])

        def data() -> np.ndarray:
            weight = self.checkpoint.quantized(module)
            assert weight is not None, "a quantized module stays one"
            if symmetric and not weight.symmetric:
                raise ModelError("The layer has zero points, and its config says sym: true.", where=where)
            if order is not None:
                parts = {name: getattr(weight, name)[order] for name in ("integers", "scales", "zero_points")}
                weight = replace(weight, **parts)
            return pack_blocks(weight, kind)

        rows = shape[0] if order is None else len(order)
        return PlannedTensor(tensor.name, f"{module}.weight", kind, (rows, shape[1]), order, data)

    def _order(self, tensor: NamedTensor, rows: int) -> np.ndarray | None:
        if tensor.piece is None or tensor.piece.rows is None:
            return None
        return tensor.piece.rows(self.architecture.config, rows)

    def _float(self, tensor: NamedTensor, source: str) -> PlannedTensor:
        """Return the plan of a float tensor; vectors are always F32, as llama.cpp requires."""
        import torch

        stored, config = self.checkpoint.stored(source), self.architecture.config
        transform = tensor.piece.values if tensor.piece is not None else None
        change = None if transform is None else lambda values: transform(values, config)
        order = self._order(tensor, len(stored) if stored.ndim else 1)
        transformed = stored if change is None else change(stored.to("meta"))
        small = transformed.ndim == 1 or tensor.always_float32
        kind = "F32" if small else self.types.floats.upper()
        if self.rules is not None and not small and tensor.name.endswith(".weight"):
            kind = self.rules.kind(tensor.name, transformed.shape[-1])
        dtype = torch.float16 if kind == "F16" else torch.float32
        importance = self.imatrix.get(source.removesuffix(".weight"))

        def data() -> np.ndarray:
            stored = self.checkpoint.stored(source)
            values: np.ndarray = (stored if change is None else change(stored.float())).to(dtype).numpy()
            if not np.isfinite(values).all():
                raise ModelError(
                    f"The tensor {source!r} holds values beyond float16's range, or NaN.",
                    where=str(self.checkpoint.folder),
                    hint="write it with float_type: f32",
                )
            values = values if order is None else values[order]
            if kind in _FLOAT_FILES:
                return values
            # The importance of an expert that received no calibration tokens is 0; it is rounded without weights.
            weights = importance.numpy() if importance is not None and importance.any() else None
            return quantize_rows(values.reshape(-1, values.shape[-1]), kind, weights)

        shape = tuple(transformed.shape) if order is None else (len(order), *transformed.shape[1:])
        return PlannedTensor(tensor.name, source, kind, shape, order, data, values=change)


def _quantization(checkpoint: Checkpoint, module: str) -> tuple[int, int, bool, tuple[int, int]] | None:
    """Return bits, group size, symmetry and [rows, columns] of a quantized module, or None for a float module."""
    if module in checkpoint.tables:
        table = checkpoint.quantized(module)
        assert table is not None, "a table is quantized"
        rows, columns = table.integers.shape
        return table.bits, table.group_size, table.symmetric, (rows, columns)
    if not checkpoint.has_integers(module):
        return None
    settings = checkpoint.layer_settings(module)
    symmetric = settings["sym"] is not False
    return settings["bits"], settings["group_size"], symmetric, checkpoint.integer_shape(module)


_ROUNDING = 1.001 * 2.0**-11
"""Half a unit in the last place of float16 as a share of the value, with a margin for float32 rounding."""
_ALLOWED = {"F16": _ROUNDING, "Q4_1": _ROUNDING, "Q5_1": _ROUNDING}


_UNRELATED = 0.5 * 2.0**0.5
"""Half of the relative error that rows in a wrong order would have; rounding to two bits has about a third."""


@dataclass(frozen=True)
class Difference:
    """Difference between a tensor in the file and in the checkpoint.

    Attributes:
        name: Name of the tensor.
        kind: Type in the file.
        largest: Largest difference of a weight, relative to the largest stored number. For a ``rounded`` tensor the
            root mean square of the difference, relative to that of the weights.
        allowed: Largest difference that the type explains.
        rounded: Whether the file rounds floats to few bits.
    """

    name: str
    kind: str
    largest: float
    allowed: float
    rounded: bool = False


def compare_gguf(file: Path, checkpoint: Checkpoint, types: GgufTypes = EXACT_TYPES) -> list[Difference]:
    """Read every tensor of ``file`` with llama.cpp's own `gguf` package and compare it with the checkpoint."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    stored = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    differences = []
    for planned in plan_gguf(checkpoint, types):
        tensor, kind = stored[planned.name], planned.kind
        restored = dequantize(tensor.data, tensor.tensor_type).reshape(planned.shape)
        expected, magnitude = _expected(checkpoint, planned)
        # Rounded tensors are compared by the root mean square, since a single weight may be off by a whole step.
        if types.file_type is not None and kind not in _FLOAT_FILES:
            error, size = (float(np.linalg.norm(values)) for values in (restored - expected, expected))
            differences.append(Difference(planned.name, kind, error / (size or 1.0), _UNRELATED, rounded=True))
            continue
        largest = float(np.abs(restored - expected).max()) / (magnitude or 1.0)
        differences.append(Difference(planned.name, kind, largest, _ALLOWED.get(kind, 0.0)))
    return differences


def _expected(checkpoint: Checkpoint, planned: PlannedTensor) -> tuple[np.ndarray, float]:
    """Return the weights in the file's row order, and the largest magnitude of them or of the stored minima."""
    if planned.parts:
        parts = [_expected(checkpoint, part) for part in planned.parts]
        return np.stack([values for values, _ in parts]), max(magnitude for _, magnitude in parts)
    # Computed tensors, such as rotary factors, have no source in the checkpoint.
    if planned.source is None:
        values = planned.data()
        return values, float(np.abs(values).max())
    module, _, part = planned.source.rpartition(".")
    quantized = checkpoint.quantized(module) if part == "weight" else None
    if quantized is None:
        stored = checkpoint.stored(planned.source).float()
        array: np.ndarray = (stored if planned.values is None else planned.values(stored)).numpy()
        magnitude = float(np.abs(array).max())
    else:
        array = quantized.dequantize().numpy()
        magnitude = max(float(np.abs(array).max()), float((quantized.zero_points * quantized.scales).max()))
    return (array if planned.order is None else array[planned.order]), magnitude
