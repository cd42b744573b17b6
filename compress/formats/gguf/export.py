"""Writer of GGUF files, which stores a checkpoint tensor by tensor and keeps quantized integers unchanged.

The layout is that of llama.cpp's own converter (convert_hf_to_gguf.py). One tensor is in memory at a time. The
experts of a block are one tensor, of the type that holds the finest of them.
"""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import numpy as np

from compress.formats.gguf.architecture import GgufArchitecture, NamedTensor
from compress.formats.gguf.blocks import (
    K_TYPES,
    block_type,
    check_blocks,
    k_type,
    pack_blocks,
    pack_k_blocks,
    rounded,
    row_bytes,
)
from compress.formats.gguf.file_types import FILE_TYPES, Typed
from compress.formats.gguf.tokenizer import add_tokenizer
from compress.models.checkpoint import Checkpoint
from compress.models.folder_checks import PROCESSOR_FILES
from compress.models.lora_adapter import ADAPTER
from compress.models.safetensors_file import read_imatrix
from compress.utils.errors import ModelError

if TYPE_CHECKING:
    from compress.numerics.integer_grid import QuantizedWeight


_ALSO = ("merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "generation_config.json")
FloatType = Literal["f16", "f32"]
_FLOAT_FILES = {"F32": 0, "F16": 1}
"""llama.cpp's numbers for files of floats (llama_ftype)."""
_LONGEST_BLOCK = 256


@dataclass(frozen=True)
class Types:
    """What tensors become: matrices that aren't quantized are of type ``floats``.

    With a ``file_type`` of llama.cpp's they are rounded by its rules, by the importance matrix that may lie beside the
    checkpoint. With ``k_quants`` integers of two and three bits take no more, and their scales are rounded.
    """

    floats: FloatType = "f16"
    file_type: str | None = None
    k_quants: bool = False


AS_IT_IS = Types()
"""Types that keep integers exactly and store the rest in float16."""


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the file to be. ``source`` is the checkpoint's name of it, or None for what is computed.

    ``shape`` is in torch's order; ``order`` are the rows of the source as the file has them, None for its own order;
    ``values`` is what is made of a float source. ``parts`` are the tensors of which it is made, of its own type each;
    they have the sources, orders and values. ``data`` gives bytes [rows, bytes of a row] of a quantized tensor, and
    values of ``shape`` of any other.
    """

    name: str
    source: str | None
    kind: str
    shape: tuple[int, ...]
    order: np.ndarray | None
    data: Callable[[], np.ndarray]
    parts: tuple[PlannedTensor, ...] = ()
    values: Callable[[Any], Any] | None = None


class _Written(np.ndarray[Any, np.dtype[Any]]):
    """An array that says so when the disk is full; numpy's own writing only says that it wrote less than it should."""

    def tofile(self, file: BinaryIO) -> None:  # type: ignore[override]
        """Write all bytes; raises the system's error."""
        file.write(self.data)


def plan_gguf(checkpoint: Checkpoint, types: Types = AS_IT_IS) -> list[PlannedTensor]:
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
    _check_all_known(checkpoint, architecture)
    named = architecture.tensors()
    imatrix = {} if types.file_type is None else read_imatrix(checkpoint.folder)
    rules = None if types.file_type is None else _typed(types.file_type, architecture, named, bool(imatrix))
    plan = _Plan(checkpoint, architecture, types, rules, imatrix)
    planned = [plan.tensor(tensor) for tensor in named]
    for name, factors in architecture.factors().items():
        planned.append(PlannedTensor(name, None, "F32", factors.shape, None, partial(np.asarray, factors)))
    return planned


def _typed(file_type: str, architecture: GgufArchitecture, named: Sequence[NamedTensor], weighed: bool) -> Typed:
    found = architecture.metadata()
    heads, shared = found["attention.head_count"], found["attention.head_count_kv"]
    return Typed(
        FILE_TYPES[file_type],
        [tensor.name for tensor in named],
        found["block_count"],
        heads / shared if heads and shared else 1.0,
        found.get("expert_count", 0),
        weighed,
    )


def write_gguf(checkpoint: Checkpoint, file: Path, types: Types = AS_IT_IS) -> None:
    """Write ``checkpoint`` to ``file`` with its tokenizer, as `plan_gguf` has it.

    Raises `ModelError` for what GGUF cannot hold, before it writes anything.
    """
    import gguf

    planned = plan_gguf(checkpoint, types)
    architecture = GgufArchitecture.of(checkpoint)
    writer = gguf.GGUFWriter(file, architecture.name)
    writer.add_type("model")
    architecture.add_metadata(writer)
    add_tokenizer(writer, checkpoint.folder, planned[0].shape[0])
    kinds = Counter(tensor.kind for tensor in planned if len(tensor.shape) > 1)
    most = kinds.most_common(1)[0][0]
    alike = (one.number for one in FILE_TYPES.values() if one.most == most)
    named = FILE_TYPES[types.file_type].number if types.file_type else _FLOAT_FILES.get(most)
    writer.add_file_type(named or next(alike, 0))
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
            writer.write_tensor_data(np.ascontiguousarray(tensor.data()).view(_Written))
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
    types: Types
    rules: Typed | None
    imatrix: Mapping[str, Any]

    def tensor(self, tensor: NamedTensor) -> PlannedTensor:
        """Return the plan of one tensor of the file, from one tensor of the checkpoint or from several stacked ones."""
        if len(tensor.sources) == 1:
            return self._part(tensor, tensor.sources[0])
        return self._stacked(tensor)

    def _stacked(self, tensor: NamedTensor) -> PlannedTensor:
        """Return several tensors as one [tensors, rows, columns], of one type that holds them all."""
        parts = [self._part(tensor, source) for source in tensor.sources]
        kinds = sorted({part.kind for part in parts}, key=lambda kind: row_bytes(kind, _LONGEST_BLOCK))
        floats = {kind for kind in kinds if kind in ("F16", "F32")}
        if floats and len(kinds) > 1:
            kept = next(part.source for part in parts if part.kind in floats)
            raise ModelError(
                f"GGUF has one type for all experts of a block, and {str(kept).removesuffix('.weight')} is not "
                "quantized as the others are.",
                where=str(self.checkpoint.folder),
                hint="quantize all experts of a block, or none",
            )
        alike = tuple(self._part(tensor, source, kinds[-1]) for source in tensor.sources)
        shape = (len(alike), *alike[0].shape)

        def data() -> np.ndarray:
            return np.stack([part.data() for part in alike])

        return PlannedTensor(tensor.name, None, kinds[-1], shape, None, data, alike)

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
        narrow = k_type(bits, symmetric, shape[1]) if self.types.k_quants else None
        kind, order = wider or narrow or block_type(bits, symmetric, where), self._order(tensor, shape[0])

        def data() -> np.ndarray:
            weight = self.checkpoint.quantized(module)
            assert weight is not None, "a quantized module stays one"
            if symmetric and not weight.symmetric:
                raise ModelError("The layer has zero points, and its config says sym: true.", where=where)
            weight = weight if order is None else _reordered(weight, order)
            return pack_k_blocks(weight, kind) if kind in K_TYPES else pack_blocks(weight, kind)

        rows = shape[0] if order is None else len(order)
        return PlannedTensor(tensor.name, f"{module}.weight", kind, (rows, shape[1]), order, data)

    def _order(self, tensor: NamedTensor, rows: int) -> np.ndarray | None:
        given = tensor.piece.rows if tensor.piece is not None else None
        return None if given is None else given(self.architecture.config, rows)

    def _float(self, tensor: NamedTensor, source: str) -> PlannedTensor:
        """Return the plan of a float tensor; vectors are always F32, as llama.cpp requires."""
        import torch

        stored = self.checkpoint.stored(source)
        order, change = self._order(tensor, len(stored) if stored.ndim else 1), self._values(tensor)
        made = stored if change is None else change(stored.to("meta"))
        small = made.ndim == 1 or tensor.always_float32
        kind = "F32" if small else self.types.floats.upper()
        if self.rules is not None and not small and tensor.name.endswith(".weight"):
            kind = self.rules.kind(tensor.name, made.shape[-1])
        wanted = torch.float16 if kind == "F16" else torch.float32
        importance = self.imatrix.get(source.removesuffix(".weight"))

        def data() -> np.ndarray:
            found = self.checkpoint.stored(source)
            values: np.ndarray = (found if change is None else change(found.float())).to(wanted).numpy()
            if not np.isfinite(values).all():
                raise ModelError(
                    f"The tensor {source!r} holds values beyond float16's range, or NaN.",
                    where=str(self.checkpoint.folder),
                    hint="write it with float_type: f32",
                )
            values = values if order is None else values[order]
            if kind in _FLOAT_FILES:
                return values
            # An expert that no token was sent to has no say.
            weights = importance.numpy() if importance is not None and importance.any() else None
            return rounded(values.reshape(-1, values.shape[-1]), kind, weights)

        shape = tuple(made.shape) if order is None else (len(order), *made.shape[1:])
        return PlannedTensor(tensor.name, source, kind, shape, order, data, values=change)

    def _values(self, tensor: NamedTensor) -> Callable[[Any], Any] | None:
        given, config = tensor.piece.values if tensor.piece is not None else None, self.architecture.config
        return None if given is None else lambda found: given(found, config)


def _quantization(checkpoint: Checkpoint, module: str) -> tuple[int, int, bool, tuple[int, int]] | None:
    """Bits, group size, symmetry and [rows, columns] of a quantized module, from what is said of it; or None."""
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


def _reordered(weight: QuantizedWeight, order: np.ndarray) -> QuantizedWeight:
    import torch

    rows = torch.from_numpy(order)
    return replace(
        weight,
        integers=weight.integers[rows],
        scales=weight.scales[rows],
        zero_points=weight.zero_points[rows],
    )


def _check_all_known(checkpoint: Checkpoint, architecture: GgufArchitecture) -> None:
    """Raise `ModelError` for a missing module and for a module that would be left out."""
    known = {name.rpartition(".")[0] for name in architecture.shapes}
    ours = (name for name in checkpoint.files if not architecture.is_ignored(name))
    found = {name.rpartition(".")[0] for name in ours} - (architecture.tied - known)
    missing, unknown = sorted(known - found), sorted(found - known)
    if missing or unknown:
        what = f"lacks {', '.join(missing[:3])}" if missing else f"has {', '.join(unknown[:3])}"
        count = len(missing or unknown)
        raise ModelError(
            f"The checkpoint {what}{' and more' if count > 3 else ''}, which is not how a "
            f"{architecture.config.model_type} is made.",
            where=str(checkpoint.folder),
            expected="the modules of transformers' own class, no more and no fewer",
        )


_ROUNDING = 1.001 * 2.0**-11
"""Half a unit in the last place of float16, as a share of the value, and a little for float32's own."""
_ALLOWED = {"F16": _ROUNDING, "Q4_1": _ROUNDING, "Q5_1": _ROUNDING}


_UNRELATED = 0.5 * 2.0**0.5
"""Half of the error, relative, that rows in another order would have; two bits round by a third."""
_SCALES = {"Q2_K": 0.15, "Q3_K": 0.05}
"""What rounding the scales of integers to 4 or 6 bits may come to, in the same measure."""


@dataclass(frozen=True)
class Difference:
    """The ``largest`` difference of a weight of the tensor ``name``, relative to the largest number stored for it.

    Of what the file ``rounded``, floats to few bits or scales, the root of the mean square, relative to that of the
    weights. ``allowed`` is what the type makes of them: minima and plain weights have float16, integers stay.
    """

    name: str
    kind: str
    largest: float
    allowed: float
    rounded: bool = False


def compare_gguf(file: Path, checkpoint: Checkpoint, types: Types = AS_IT_IS) -> list[Difference]:
    """Read every tensor of ``file`` with the `gguf` package, llama.cpp's own, and hold it against the checkpoint."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    stored = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    found = []
    for planned in plan_gguf(checkpoint, types):
        tensor, kind = stored[planned.name], planned.kind
        given = dequantize(tensor.data, tensor.tensor_type).reshape(planned.shape)
        wanted, magnitude = _expected(checkpoint, planned)
        floats = types.file_type is not None and kind not in ("F16", "F32")
        if floats or kind in K_TYPES:
            allowed = _UNRELATED if floats else _SCALES[kind]
            error, size = (float(np.linalg.norm(values)) for values in (given - wanted, wanted))
            found.append(Difference(planned.name, kind, error / (size or 1.0), allowed, rounded=True))
            continue
        largest = float(np.abs(given - wanted).max()) / (magnitude or 1.0)
        found.append(Difference(planned.name, kind, largest, _ALLOWED.get(kind, 0.0)))
    return found


def _expected(checkpoint: Checkpoint, planned: PlannedTensor) -> tuple[np.ndarray, float]:
    """The weights in the file's order of rows, and the largest of them or of the minima that they are stored with."""
    if planned.parts:
        found = [_expected(checkpoint, part) for part in planned.parts]
        return np.stack([values for values, _ in found]), max(magnitude for _, magnitude in found)
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
