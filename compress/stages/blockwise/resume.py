"""Packed layers that a killed run goes on from: those of each block that is done, and the embedding table and the head.

A head that is tied to the table has the table's integers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.nn.functional import pad

from compress.models.checkpoint import TABLES
from compress.models.gptq_layout import PARTS, pack_layer
from compress.models.safetensors_file import read_header, read_metadata, read_tensor, write_whole
from compress.numerics.integer_grid import QuantizedWeight
from compress.stages.blockwise.blockwise_model import BlockwiseModel
from compress.stages.blockwise.calibration import CalibrationActivations
from compress.stages.blockwise.layers import Layer, skip_reason
from compress.stages.gptq.settings import FLOAT_BITS, Quantization
from compress.stages.gptq.solver import solve_layers
from compress.utils.errors import ModelError


@dataclass(frozen=True)
class BlockCache:
    """The blocks that are done, in ``folder``; a file has its name only once it is whole and on the disk."""

    folder: Path

    def file(self, index: int) -> Path:
        """Return the file of a block's layers."""
        return self.folder / f"block-{index:05}.safetensors"

    def count(self, blocks: int) -> int:
        """Return how many consecutive blocks are done, from the first on."""
        return next((index for index in range(blocks) if self.layers(index) is None), blocks)

    def first(self, blocks: int, stream: CalibrationActivations | None) -> int:
        """Return the block to resume with; finished blocks count only if the next block's input is stored."""
        done = self.count(blocks)
        return done if stream is None or done in (0, blocks) or stream.entering(done).are_whole else 0

    def layers(self, index: int) -> tuple[Layer, ...] | None:
        """Return the results for a block's layers, or None if the block is not done."""
        if not self.file(index).is_file():
            return None
        try:
            return layers_in(self.file(index))
        except ModelError:
            return None

    def store(self, index: int, tensors: Mapping[str, torch.Tensor], layers: Sequence[Layer]) -> None:
        """Keep a block's packed layers, and float tensors of it that are not the model's own any more."""
        cpu_tensors = {name: tensor.cpu() for name, tensor in tensors.items()}
        write_whole(self.file(index), cpu_tensors, {"layers": layers_to_text(layers)})

    def names(self, index: int) -> tuple[str, ...]:
        """Return the names of the tensors stored for a block."""
        return tuple(tensor.name for tensor in read_header(self.file(index)))

    def tensor(self, index: int, name: str) -> torch.Tensor:
        """Return one tensor stored for a block, mapped from its file."""
        return read_tensor(self.file(index), name)


def layers_to_text(layers: Sequence[Layer]) -> str:
    """Layers as JSON, for a file's metadata."""
    return json.dumps([layer.to_json() | {"bits": layer.bits} for layer in layers])


def layers_in(path: Path) -> tuple[Layer, ...]:
    """Return the layers described in a file's metadata."""
    return tuple(Layer(**layer) for layer in json.loads(read_metadata(path)["layers"]))


TABLE_BITS = (4, 5, 8)
"""What a table may get. ONNX keeps five bits in planes and makes eight of them as it loads; GGUF has them as Q5_0."""
_ROWS = 8192
"""Rows that are quantized at a time; a multiple of 32, so that packed pieces lie side by side."""
_FLOATS = "tables-float16.safetensors"


@dataclass(frozen=True)
class EmbeddingTables:
    """The quantized tables in a folder of work in progress."""

    folder: Path

    @property
    def packed(self) -> Path:
        """Their integers, as `Checkpoint` reads them."""
        return self.folder / TABLES

    def floats(self, name: str) -> torch.Tensor:
        """Return the dequantized values of a table, float16, mapped from the file."""
        return read_tensor(self.folder / _FLOATS, f"{name}.weight")


def plan_tables(decoder: BlockwiseModel, config: Quantization, bits: int | None) -> tuple[Layer, ...]:
    """Return the embedding and, if it has its own weights, the head. Raises `ModelError` if the width does not fit."""
    modules = [decoder.embedding, *([] if decoder.tied else [decoder.model.get_output_embeddings()])]
    # Not the embedding's weight: at work it has the rows of some tokens only.
    rows, columns = decoder.vocabulary, decoder.embedding.embedding_dim
    tables = []
    for module in modules:
        name = decoder.name(module)
        reason = skip_reason(config.keep, name)
        if bits in (None, 16) or reason:
            tables.append(Layer(name, rows, columns, None, why=reason or "left as float16"))
            continue
        if columns % config.embedding_group_size or columns % 32:
            raise ModelError(
                f"The table {name} [{rows}, {columns}] is not divided by groups of {config.embedding_group_size}.",
                expected=f"a group that divides {columns}, which must be a multiple of 32",
                hint="choose another embedding_group_size, or embedding_bits: 16",
            )
        tables.append(Layer(name, rows, columns, bits, config.embedding_group_size))
    return tuple(tables)


def choose_table_bits(decoder: BlockwiseModel, config: Quantization) -> int:
    """Return the bits of the embedding and the head: those of ``config``, or by their share of the model's weights."""
    if decoder.tied and skip_reason(config.keep, decoder.name(decoder.model.get_output_embeddings())):
        return FLOAT_BITS
    weights = decoder.vocabulary * decoder.embedding.embedding_dim * (1 if decoder.tied else 2)
    return config.table_bits(weights, decoder.count_parameters() - weights)


def quantize_tables(
    decoder: BlockwiseModel,
    config: Quantization,
    plan: Sequence[Layer],
    hessian: Callable[[], torch.Tensor] | None,
    folder: Path,
) -> tuple[Layer, ...]:
    """Quantize the tables of ``plan`` into ``folder``; ``hessian`` gives that of the head, [columns, columns].

    The head is solved under it. Without one, and for an embedding that is not the head, each row is rounded to
    nearest. Raises `StageError`.
    """
    folder.mkdir(exist_ok=True)
    if (folder / _FLOATS).is_file():
        return layers_in(folder / _FLOATS)
    packed: dict[str, torch.Tensor] = {}
    floats: dict[str, torch.Tensor] = {}
    results: list[Layer] = []
    inputs = hessian() if hessian is not None and any(table.bits for table in plan) else None
    for table in plan:
        if table.bits is None or table.group_size is None:
            results.append(table)
            continue
        weight_name = f"{table.name}.weight"
        used = inputs if decoder.head_weight == weight_name else None
        pieces, floats[weight_name], solved = _by_rows(config, table, decoder.checkpoint.stored(weight_name), used)
        packed |= {f"{table.name}.{part}": tensor for part, tensor in pieces.items()}
        results.append(solved)
    if packed:
        _write(folder, packed, floats, results)
    return tuple(results)


def keep_tables(weights: Mapping[str, QuantizedWeight], plan: Sequence[Layer], folder: Path) -> None:
    """Write tables that are quantized already, and of which ``plan`` tells, as `quantize_tables` writes its own."""
    folder.mkdir(exist_ok=True)
    packed: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        parts = pack_layer(_padded(weight), stored_less_one=False)
        packed |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    floats = {f"{name}.weight": weight.dequantize().half() for name, weight in weights.items()}
    _write(folder, packed, floats, plan)


def _write(
    folder: Path, packed: Mapping[str, torch.Tensor], floats: Mapping[str, torch.Tensor], tables: Sequence[Layer]
) -> None:
    about = {
        table.name: {"bits": table.bits, "group_size": table.group_size, "rows": table.rows}
        for table in tables
        if table.bits
    }
    write_whole(folder / TABLES, packed, {"tables": json.dumps(about)})
    write_whole(folder / _FLOATS, floats, {"layers": layers_to_text(tables)})


def _by_rows(
    config: Quantization, table: Layer, weight: torch.Tensor, hessian: torch.Tensor | None
) -> tuple[dict[str, torch.Tensor], torch.Tensor, Layer]:
    halves = torch.empty(weight.shape, dtype=torch.float16)
    pieces: list[dict[str, torch.Tensor]] = []
    error, damping = 0.0, None
    for rows, half_rows in zip(torch.split(weight, _ROWS), torch.split(halves, _ROWS), strict=True):
        device_rows = rows if hessian is None else rows.to(hessian.device)
        (solution,) = solve_layers(config, [table], [device_rows.float()], hessian)
        solved = solution.weight.cpu()
        assert solution.layer.error is not None
        error += solution.layer.error * len(rows) / len(weight)
        damping = solution.layer.damping
        half_rows.copy_(solved.dequantize())
        pieces.append(pack_layer(_padded(solved), stored_less_one=False, known_bits=TABLE_BITS))
    joined = {part: torch.cat([piece[part] for piece in pieces], dim=1) for part in PARTS if part != "g_idx"}
    return joined | {"g_idx": pieces[0]["g_idx"]}, halves, table.solved(error, damping)


def _padded(weight: QuantizedWeight) -> QuantizedWeight:
    """Append rows of zeros that fill the last word."""
    missing, middle = -len(weight.integers) % 32, 1 << (weight.bits - 1)
    parts = ((weight.integers, middle), (weight.scales, 1), (weight.zero_points, middle))
    integers, scales, zeros = (pad(values, (0, 0, 0, missing), value=fill) for values, fill in parts)
    return replace(weight, integers=integers, scales=scales, zero_points=zeros)
