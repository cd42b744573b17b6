"""Hugging Face folders whose tensors, also quantized ones, are read one at a time: no model has to fit in memory."""

from __future__ import annotations

import json
import operator
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from compress.models.folder_checks import INDEX, WEIGHTS, check_model_folder, weight_files
from compress.models.json_file import read_json, read_optional_json, wrong_fields
from compress.models.model import link_or_copy
from compress.models.quantization_config import COMPRESSED_TENSORS, layer_settings
from compress.models.safetensors_file import read_header, read_metadata, read_tensor
from compress.models.stored_tensor import StoredTensor
from compress.utils.errors import ModelError, first_line
from compress.utils.read_limits import parse_json

if TYPE_CHECKING:
    import torch

    from compress.numerics.integer_grid import QuantizedWeight


TABLES = "quantized_tables.safetensors"
"""Integers of embeddings and tied heads, for which the GPTQ format has no place.

Tensors are named `NAME.qweight` and so on as in `gptq_layout`, with rows padded to a multiple of 32. The file's
metadata holds `bits`, `group_size` and `rows` of each NAME as JSON. The checkpoint itself stores the dequantized
table as float16.
"""
_MARKS = ("qweight", "weight_scale")
"""Suffixes of which every quantized layer has one, in either layout."""


@dataclass(frozen=True)
class Checkpoint:
    """Folder in Hugging Face layout: config, safetensors shards, processor. Nothing is read before it is needed."""

    kind: ClassVar[str] = "checkpoint"
    folder: Path

    @classmethod
    def load(cls, directory: Path, task: object) -> Self:
        """Open a folder. Raises `ModelError` if it is no model folder."""
        check_model_folder(directory)
        return cls(directory)

    def save(self, directory: Path) -> None:
        """Write every file into ``directory``, as a link if the file system supports it, else as a copy."""
        for path in sorted(path for path in self.folder.rglob("*") if path.is_file()):
            target = directory / path.relative_to(self.folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            # Links make a copy of a large checkpoint free.
            link_or_copy(path, target)

    @cached_property
    def config(self) -> dict[str, Any]:
        """Return the parsed `config.json`."""
        return read_json(self.folder / "config.json")

    @cached_property
    def files(self) -> Mapping[str, Path]:
        """Return the file of each stored tensor, by tensor name."""
        return {tensor.name: file for file in weight_files(self.folder) for tensor in read_header(file)}

    @cached_property
    def aliases(self) -> Mapping[str, str]:
        """Return the stored names of tensors that transformers' modules name differently, such as GPT-NeoX's head."""
        from compress.models.meta_model import stored_names

        return stored_names(self.folder)

    def holds(self, name: str) -> bool:
        """Return True if a tensor is stored under this name, or under another one that transformers maps to it."""
        return name in self.files or ("model_type" in self.config and self.aliases.get(name) in self.files)

    def stored(self, name: str) -> torch.Tensor:
        """Return one tensor as stored, memory-mapped from its file. Raises `ModelError` for an unknown name."""
        # transformers may use another name than the file.
        if name not in self.files and self.holds(name):
            name = self.aliases[name]
        if name not in self.files:
            raise ModelError(
                f"The checkpoint has no tensor {name!r}.",
                where=str(self.folder),
                expected="every weight of the architecture that config.json names",
            )
        return read_tensor(self.files[name], name)

    def weight(self, module: str) -> torch.Tensor:
        """Return the weight of a module in float32, dequantized if it is quantized."""
        quantized = self.quantized(module)
        return self.stored(f"{module}.weight").float() if quantized is None else quantized.dequantize()

    def quantized(self, module: str) -> QuantizedWeight | None:
        """Return the integers of a linear layer or an embedding table, or None if it is not quantized."""
        # Tables are stored as integers in a separate file.
        if module in self.tables:
            return self._table(module)
        if not self.has_integers(module):
            return None
        settings = self.layer_settings(module)
        with self._integers_of(module):
            return _checked(self._unpacked(module, settings["bits"], settings["group_size"]))

    @contextmanager
    def _integers_of(self, module: str) -> Iterator[None]:
        """Turn what torch raises for tensors that do not fit together into a `ModelError`."""
        try:
            yield
        except (ArithmeticError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ModelError(
                f"The integers of {module} do not fit together, or not the config: {first_line(error)}",
                where=str(self.folder),
                expected="packed integers, scales and zero points of one shape, with their bits and group_size",
                hint="fetch the model again; its files may be of different versions",
            ) from error

    def _unpacked(self, module: str, bits: int, group_size: int) -> QuantizedWeight:
        from compress.models import compressed_tensors_layout, gptq_layout

        if self.is_compressed_tensors:
            stored_parts = [part for part in compressed_tensors_layout.PARTS if f"{module}.{part}" in self.files]
            parts = {part: self.stored(f"{module}.{part}") for part in stored_parts}
            return compressed_tensors_layout.unpack_layer(parts, bits, group_size)
        tensors = {part: self.stored(f"{module}.{part}") for part in gptq_layout.PARTS}
        return gptq_layout.unpack_layer(tensors, bits, group_size, self.stored_less_one)

    def has_integers(self, module: str) -> bool:
        """Return True if only integers are stored for a layer; tables store floats and, in another file, integers."""
        return any(f"{module}.{mark}" in self.files for mark in _MARKS)

    @cached_property
    def integer_layers(self) -> tuple[str, ...]:
        """Return the names of the layers that are stored as integers, in the order of the files."""
        split_names = (name.rpartition(".") for name in self.files)
        return tuple(module for module, _, mark in split_names if mark in _MARKS)

    def integer_shape(self, module: str) -> tuple[int, int]:
        """Return [rows, columns] of one of the `integer_layers`."""
        with self._integers_of(module):
            # 8-bit integers of compressed-tensors are not packed.
            if f"{module}.weight" in self.files:
                rows, columns = self.stored(f"{module}.weight").shape
                return rows, columns
            if self.is_compressed_tensors:
                rows, words = self.stored(f"{module}.weight_packed").shape
            else:
                words, rows = self.stored(f"{module}.qweight").shape
            return rows, words * 32 // self.layer_settings(module)["bits"]

    @property
    def quantization(self) -> dict[str, Any] | None:
        """Return the `quantization_config` of a quantized checkpoint, or None. Raises `ModelError`."""
        quantization = self.config.get("quantization_config")
        if quantization is not None and not isinstance(quantization, dict):
            raise ModelError(
                f"The quantization_config holds {type(quantization).__name__}.",
                where=str(self.folder / "config.json"),
                expected="a JSON object",
            )
        return quantization

    @property
    def is_compressed_tensors(self) -> bool:
        """Return True for the layout of compressed-tensors, False for the one of AutoGPTQ."""
        return (self.quantization or {}).get("quant_method") == COMPRESSED_TENSORS

    @property
    def stored_less_one(self) -> bool:
        """Return True if zero points are stored minus one (`checkpoint_format: gptq`)."""
        return bool((self.quantization or {}).get("checkpoint_format", "gptq") == "gptq")

    def layer_settings(self, module: str) -> dict[str, Any]:
        """Return `bits`, `group_size` and `sym` of a quantized layer from the config. Raises `ModelError`."""
        with wrong_fields(self.folder / "config.json"):
            settings = layer_settings(self.quantization or {}, module)
            bits, size = settings["bits"], settings["group_size"]
            if bits is not None and not (type(bits) is int and 1 <= bits <= 32):
                raise ValueError(f"{module} has {bits!r:.40} bits")
            if size is not None and not (type(size) is int and (size == -1 or size > 0)):
                raise ValueError(f"{module} has a group_size of {size!r:.40}")
        return settings

    @cached_property
    def tables(self) -> Mapping[str, Mapping[str, int]]:
        """Return `bits`, `group_size` and `rows` of each quantized table, by module name."""
        path = self.folder / TABLES
        if not path.is_file():
            return {}
        with wrong_fields(path):
            settings = parse_json(read_metadata(path)["tables"])
            return {
                str(module): {name: operator.index(table[name]) for name in ("bits", "group_size", "rows")}
                for module, table in settings.items()
            }

    def _table(self, module: str) -> QuantizedWeight:
        from compress.models.gptq_layout import PARTS, unpack_layer

        settings = self.tables[module]
        tensors = {part: read_tensor(self.folder / TABLES, f"{module}.{part}") for part in PARTS}
        with self._integers_of(module):
            unpacked = unpack_layer(tensors, settings["bits"], settings["group_size"], stored_less_one=False)
            padded = _checked(unpacked)
        # Rows were padded to a multiple of 32 for packing.
        rows = slice(settings["rows"])
        parts = {name: getattr(padded, name)[rows] for name in ("integers", "scales", "zero_points")}
        return replace(padded, **parts)


def _checked(weight: QuantizedWeight) -> QuantizedWeight:
    """Return a weight. Raises `ValueError` if its scales and zero points are not those of the groups of its rows."""
    rows, columns = weight.integers.shape
    groups = (rows, -(-columns // weight.group_size))
    if tuple(weight.scales.shape) != groups or tuple(weight.zero_points.shape) != groups:
        found = f"{tuple(weight.scales.shape)} and {tuple(weight.zero_points.shape)}"
        raise ValueError(f"scales and zero points of {found} for groups of {groups}")
    return weight


@dataclass(frozen=True)
class QuantizedCheckpoint(Checkpoint):
    """Checkpoint in GPTQ format (AutoGPTQ layout), with quantized embedding tables in a separate file."""

    kind: ClassVar[str] = "quantized checkpoint"


@dataclass(frozen=True)
class CompressedTensorsCheckpoint(Checkpoint):
    """Quantized checkpoint in the layout of compressed-tensors, for inference servers with a GPU."""

    kind: ClassVar[str] = "served checkpoint"


_PACKED = (".qweight", ".weight_packed")
_COMPANIONS = (".qzeros", ".scales", ".g_idx", ".weight_scale", ".weight_zero_point", ".weight_shape")


def read_tensors(file: Path, root: Path) -> list[StoredTensor]:
    """Return the tensors of a file, with packed weights, scales and zero points marked by the quantization config."""
    # The config is that of GPTQ, AWQ or compressed-tensors.
    config = read_optional_json(root / "config.json").get("quantization_config")
    quantization = config if isinstance(config, dict) else {}
    tensors = read_header(file)
    with wrong_fields(root / "config.json"):
        return [_as_meant(tensor, layer_settings(quantization, tensor.module)["bits"]) for tensor in tensors]


def _as_meant(tensor: StoredTensor, bits: object) -> StoredTensor:
    """Return a tensor with the role and type that its name implies in a checkpoint of ``bits``-wide packed weights."""
    if not isinstance(bits, int) or bits < 1:
        return tensor
    if tensor.name.endswith(_PACKED) and tensor.dtype == "int32":
        # One int32 word holds several weights.
        weights = tensor.elements * 32 // bits
        packed = {"role": "weight", "dtype": f"int{bits}", "parameters": weights, "packed": True}
        return tensor.model_copy(update=packed)
    if tensor.name.endswith(_COMPANIONS):
        return tensor.model_copy(update={"role": "quantization", "parameters": 0})
    return tensor


SHARD_BYTES = 500_000_000


def write_shards(
    folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], shard_bytes: int = SHARD_BYTES, index_one: bool = False
) -> None:
    """Write `model.safetensors`, or shards of about ``shard_bytes`` with an index; one shard is held in memory.

    Args:
        folder: Folder to write to.
        tensors: Names and tensors, in the order of the file.
        shard_bytes: Approximate size of a shard.
        index_one: Write an index for a single file too.
    """
    parts: list[Path] = []
    names: dict[str, int] = {}
    buffered: dict[str, torch.Tensor] = {}
    total, size = 0, 0
    for name, tensor in tensors:
        # Start a new shard before this tensor would exceed the limit.
        if buffered and size + tensor.nbytes > shard_bytes:
            parts.append(_write(folder, len(parts), buffered))
            buffered, size = {}, 0
        buffered[name], names[name] = tensor, len(parts)
        size, total = size + tensor.nbytes, total + tensor.nbytes
    parts.append(_write(folder, len(parts), buffered))
    # The final names contain the number of shards, which is known only now.
    count = len(parts)
    shards = [WEIGHTS] if count == 1 else [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    for part, shard in zip(parts, shards, strict=True):
        part.rename(folder / shard)
    if count > 1 or index_one:
        index = {"metadata": {"total_size": total}, "weight_map": {name: shards[names[name]] for name in sorted(names)}}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _write(folder: Path, index: int, tensors: dict[str, torch.Tensor]) -> Path:
    from safetensors.torch import save_file

    path = folder / f"part-{index:05}.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    return path


def write_with_changes(
    checkpoint: Checkpoint,
    folder: Path,
    changed: Mapping[str, torch.Tensor],
    tables: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write a copy of ``checkpoint`` in which some tensors are replaced; one shard is held in memory.

    Args:
        checkpoint: Source of all other files and tensors.
        folder: Existing, empty folder.
        changed: New tensors by name.
        tables: New tensors of the file `TABLES` by name.

    Raises:
        ModelError: If a tensor has another shape or dtype than the one it replaces, or replaces none.
    """
    # Link everything first, then replace only the files with changed tensors.
    checkpoint.save(folder)
    missing = set(changed) | set(tables or ())
    for file in weight_files(checkpoint.folder):
        missing -= _rewrite(file, folder / file.relative_to(checkpoint.folder), changed)
    if tables:
        missing -= _rewrite(checkpoint.folder / TABLES, folder / TABLES, tables)
    if missing:
        raise ModelError(f"The checkpoint has no tensor {min(missing)!r} to change.", where=str(checkpoint.folder))


def _rewrite(source: Path, target: Path, changed: Mapping[str, torch.Tensor]) -> set[str]:
    """Write a changed file to a temporary name and rename it, and return the names of the changed tensors.

    Renaming leaves other links to ``target`` unchanged.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(source, framework="pt") as file:
        names = set(file.keys()) & set(changed)
        if not names:
            return names
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    for name in names:
        old, new = tensors[name], changed[name]
        # Shapes and types must stay, so that index and config remain valid.
        if old.shape != new.shape or old.dtype != new.dtype:
            raise ModelError(
                f"The tensor {name!r} would become {list(new.shape)} {new.dtype}.",
                where=str(source),
                expected=f"{list(old.shape)} {old.dtype}",
            )
        tensors[name] = new.contiguous()
    partial = target.with_name(f"{target.name}.partial")
    save_file(tensors, partial, metadata=metadata)
    partial.replace(target)
    return names
