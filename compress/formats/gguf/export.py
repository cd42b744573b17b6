"""A GGUF file written from a checkpoint tensor by tensor, quantized integers as they are.

The layout is that of llama.cpp's own converter (convert_hf_to_gguf.py) for Llama, Mistral, Mixtral, Qwen2 and Qwen3.
One tensor is in memory at a time; the experts of a block are one, of the type that holds the finest of them.
"""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import numpy as np

from compress.checkpoints.adapter import ADAPTER
from compress.checkpoints.checkpoint import Checkpoint
from compress.checkpoints.checks import PROCESSOR_FILES
from compress.errors import ModelError
from compress.formats.gguf.architecture import GgufArchitecture
from compress.formats.gguf.blocks import BLOCK, block_type, check_blocks, pack_blocks, row_bytes
from compress.formats.gguf.tokenizer import add_tokenizer

if TYPE_CHECKING:
    from compress.numerics.integer_grid import QuantizedWeight

_ALSO = ("merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "generation_config.json")
FloatType = Literal["f16", "f32"]
_FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9}
"""llama.cpp's number for a file whose matrices are mostly of a type (llama_ftype)."""


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the file to be. ``source`` is the checkpoint's name of it, or None for what is computed.

    ``shape`` is in torch's order; ``order`` are the rows of the source as the file has them, None for its own order.
    ``parts`` are the experts of which it is made, of its own type each; they have the sources and orders.
    ``data`` gives bytes [rows, bytes of a row] of a quantized tensor, and values of ``shape`` of any other.
    """

    name: str
    source: str | None
    kind: str
    shape: tuple[int, ...]
    order: np.ndarray | None
    data: Callable[[], np.ndarray]
    parts: tuple[PlannedTensor, ...] = ()


class _Written(np.ndarray[Any, np.dtype[Any]]):
    """An array that says so when the disk is full; numpy's own writing only says that it wrote less than it should."""

    def tofile(self, file: BinaryIO) -> None:  # type: ignore[override]
        """Write all bytes; raises the system's error."""
        file.write(self.data)


def plan_gguf(checkpoint: Checkpoint, float_type: FloatType = "f16") -> list[PlannedTensor]:
    """Every tensor that `write_gguf` writes, in its order; matrices that aren't quantized are of ``float_type``.

    Raises `ModelError` for an architecture, a tensor or a quantization that GGUF cannot hold.
    """
    if (checkpoint.folder / ADAPTER).is_dir():
        raise ModelError(
            "The checkpoint has an adapter, which GGUF keeps in a file of its own.",
            where=str(checkpoint.folder / ADAPTER),
            expected="a checkpoint without an adapter",
            mend="leave out the stage that adds it, or merge the adapter before quantization with merge_lora",
        )
    architecture = GgufArchitecture.of(checkpoint)
    _check_all_known(checkpoint, architecture)
    names = architecture.names()
    planned = []
    for module in architecture.modules():
        own = names.get_name(module)
        if own is None:
            raise ModelError(f"GGUF has no name for the module {module!r}.", where=architecture.where)
        parts = architecture.parts(module)
        wanted: FloatType = "f32" if architecture.is_router(module) else float_type
        if parts == [module]:
            planned.append(_weight(checkpoint, architecture, module, f"{own}.weight", wanted))
        else:
            planned.append(_stacked(checkpoint, architecture, parts, f"{own}.weight", wanted))
        if f"{module}.bias" in checkpoint.files:
            order = architecture.row_order(module)
            planned.append(_float(checkpoint, f"{module}.bias", f"{own}.bias", order, "f32"))
    factors = architecture.rotary_factors()
    if factors is not None:
        planned.append(PlannedTensor("rope_freqs.weight", None, "F32", factors.shape, None, lambda: factors))
    return planned


def write_gguf(checkpoint: Checkpoint, file: Path, float_type: FloatType = "f16") -> None:
    """Write ``checkpoint`` to ``file`` with its tokenizer.

    Raises `ModelError` for what GGUF cannot hold, before it writes anything.
    """
    import gguf

    planned = plan_gguf(checkpoint, float_type)
    architecture = GgufArchitecture.of(checkpoint)
    writer = gguf.GGUFWriter(file, architecture.name)
    writer.add_type("model")
    architecture.add_metadata(writer)
    add_tokenizer(writer, checkpoint.folder, planned[0].shape[0])
    kinds = Counter(tensor.kind for tensor in planned if len(tensor.shape) > 1)
    writer.add_file_type(_FILE_TYPES[kinds.most_common(1)[0][0]])
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
    """Put config and tokenizer files beside the GGUF file, for those who encode text in transformers' way."""
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for name in (*PROCESSOR_FILES, *_ALSO):
        if (checkpoint.folder / name).is_file():
            shutil.copyfile(checkpoint.folder / name, folder / name)


def _stacked(
    checkpoint: Checkpoint, architecture: GgufArchitecture, modules: list[str], name: str, float_type: FloatType
) -> PlannedTensor:
    """The weights of several modules as one tensor [modules, rows, columns], of one type that holds them all."""
    parts = [_weight(checkpoint, architecture, module, name, float_type) for module in modules]
    kinds = sorted({part.kind for part in parts}, key=lambda kind: row_bytes(kind, BLOCK))
    floats = {kind for kind in kinds if kind in ("F16", "F32")}
    if floats and len(kinds) > 1:
        kept = next(module for module, part in zip(modules, parts, strict=True) if part.kind in floats)
        raise ModelError(
            f"GGUF has one type for all experts of a block, and {kept} is not quantized as the others are.",
            where=str(checkpoint.folder),
            mend="quantize all experts of a block, or none",
        )
    alike = tuple(_weight(checkpoint, architecture, module, name, float_type, kinds[-1]) for module in modules)
    shape = (len(alike), *alike[0].shape)
    return PlannedTensor(name, None, kinds[-1], shape, None, lambda: np.stack([part.data() for part in alike]), alike)


def _weight(
    checkpoint: Checkpoint,
    architecture: GgufArchitecture,
    module: str,
    name: str,
    float_type: FloatType,
    wider: str | None = None,
) -> PlannedTensor:
    """A module's weight; ``wider`` is a type to use in place of the smallest that holds it."""
    order = architecture.row_order(module)
    about = _quantization(checkpoint, module)
    if about is None:
        return _float(checkpoint, f"{module}.weight", name, order, float_type)
    bits, group_size, symmetric, shape = about
    where = f"{module} of {checkpoint.folder}"
    check_blocks(shape[1], shape[1] if group_size == -1 else group_size, where)
    kind = wider or block_type(bits, symmetric, where)

    def data() -> np.ndarray:
        weight = checkpoint.quantized(module)
        assert weight is not None, "a quantized module stays one"
        if symmetric and not weight.symmetric:
            raise ModelError("The layer has zero points, and its config says sym: true.", where=where)
        return pack_blocks(weight if order is None else _reordered(weight, order), kind)

    return PlannedTensor(name, f"{module}.weight", kind, shape, order, data)


def _float(
    checkpoint: Checkpoint, source: str, name: str, order: np.ndarray | None, float_type: FloatType
) -> PlannedTensor:
    """A tensor in floating point; vectors are always F32, as llama.cpp wants them."""
    import torch

    stored = checkpoint.stored(source)
    kind = "F32" if stored.ndim == 1 else float_type.upper()
    wanted = torch.float32 if kind == "F32" else torch.float16

    def data() -> np.ndarray:
        tensor = checkpoint.stored(source)
        values: np.ndarray = tensor.to(wanted).numpy()
        if not np.isfinite(values).all():
            raise ModelError(
                f"The tensor {source!r} holds values beyond float16's range, or NaN.",
                where=str(checkpoint.folder),
                mend="write it with float_type: f32",
            )
        return values if order is None else values[order]

    return PlannedTensor(name, source, kind, tuple(stored.shape), order, data)


def _quantization(checkpoint: Checkpoint, module: str) -> tuple[int, int, bool, tuple[int, int]] | None:
    """Bits, group size, symmetry and [rows, columns] of a quantized module, from what is said of it; or None."""
    if module in checkpoint.tables:
        table = checkpoint.quantized(module)
        assert table is not None, "a table is quantized"
        rows, columns = table.integers.shape
        return table.bits, table.group_size, table.symmetric, (rows, columns)
    if f"{module}.qweight" not in checkpoint.files:
        return None
    settings = checkpoint.layer_settings(module)
    packed, rows = checkpoint.stored(f"{module}.qweight").shape
    symmetric = bool((checkpoint.quantization or {}).get("sym", True))
    return settings["bits"], settings["group_size"], symmetric, (rows, packed * 32 // settings["bits"])


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
    """Raise `ModelError` for a module that is missing, and for one that would be left out."""
    known = {part for module in architecture.modules() for part in architecture.parts(module)}
    found = {name.rpartition(".")[0] for name in checkpoint.files}
    if architecture.tied:
        found.discard("lm_head")
    found = {module for module in found if not module.endswith("rotary_emb")}
    missing, unknown = sorted(known - found), sorted(found - known)
    if missing or unknown:
        what = f"lacks {', '.join(missing[:3])}" if missing else f"has {', '.join(unknown[:3])}"
        count = len(missing or unknown)
        raise ModelError(
            f"The checkpoint {what}{' and more' if count > 3 else ''}, which is not how a "
            f"{architecture.config['model_type']} is made.",
            where=str(checkpoint.folder),
            expected="the modules of transformers' own class, no more and no fewer",
        )
