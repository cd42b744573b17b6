"""A Hugging Face folder whose tensors are read one by one, quantized ones too: no model need fit in memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from compress.models.json_file import read_json
from compress.models.model import link_or_copy
from compress.models.quantization_config import COMPRESSED_TENSORS, layer_settings
from compress.utils.errors import ModelError

if TYPE_CHECKING:
    import torch

    from compress.models.stored_tensor import StoredTensor
    from compress.numerics.integer_grid import QuantizedWeight


TABLES = "quantized_tables.safetensors"
"""Integers of embeddings and tied heads, which the GPTQ format has no place for: `NAME.qweight` and so on as in
`gptq_layout`, rows padded to a multiple of 32, with `bits` and `group_size` of each NAME in the file's metadata as
JSON. The checkpoint itself keeps such a table as plain float16, with the values that the integers stand for."""
_MARKS = ("qweight", "weight_scale")
"""A tensor of one of these names has every layer of integers, whichever way it is laid out."""


@dataclass(frozen=True)
class Checkpoint:
    """A folder in Hugging Face layout: config, safetensors shards, processor. Nothing is read before it is needed."""

    kind: ClassVar[str] = "checkpoint"
    folder: Path

    @classmethod
    def load(cls, directory: Path, task: object) -> Self:
        """Open a folder. Raises `ModelError` for one that holds something else."""
        from compress.models.folder_checks import check_model_folder

        check_model_folder(directory)
        return cls(directory)

    def save(self, directory: Path) -> None:
        """Put every file into ``directory``: linked where the file system can, else copied."""
        for path in sorted(path for path in self.folder.rglob("*") if path.is_file()):
            target = directory / path.relative_to(self.folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(path, target)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The parsed `config.json`."""
        return read_json(self.folder / "config.json")

    @cached_property
    def files(self) -> Mapping[str, Path]:
        """The file of each stored tensor, by its name."""
        from compress.models.folder_checks import weight_files
        from compress.models.safetensors_file import read_header

        return {tensor.name: file for file in weight_files(self.folder) for tensor in read_header(file)}

    @cached_property
    def aliases(self) -> Mapping[str, str]:
        """Stored names of tensors that transformers' modules call otherwise, such as GPT-NeoX's head."""
        from compress.models.meta_model import stored_names

        return stored_names(self.folder)

    def holds(self, name: str) -> bool:
        """Whether there is a tensor of that name, or one that transformers calls so."""
        return name in self.files or ("model_type" in self.config and self.aliases.get(name) in self.files)

    def stored(self, name: str) -> torch.Tensor:
        """One tensor as it is stored, mapped from its file. Raises `ModelError` for a name that isn't there."""
        from compress.models.safetensors_file import read_tensor

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
        """The weight of a module in float32, dequantized where it is quantized."""
        quantized = self.quantized(module)
        return self.stored(f"{module}.weight").float() if quantized is None else quantized.dequantize()

    def quantized(self, module: str) -> QuantizedWeight | None:
        """The integers of a linear layer or an embedding table, or None where it is not quantized."""
        from compress.models import compressed_tensors_layout, gptq_layout

        if module in self.tables:
            return self._table(module)
        if not self.has_integers(module):
            return None
        settings = self.layer_settings(module)
        bits, group_size = settings["bits"], settings["group_size"]
        if self.is_compressed_tensors:
            held = [part for part in compressed_tensors_layout.PARTS if f"{module}.{part}" in self.files]
            parts = {part: self.stored(f"{module}.{part}") for part in held}
            return compressed_tensors_layout.unpack_layer(parts, bits, group_size)
        tensors = {part: self.stored(f"{module}.{part}") for part in gptq_layout.PARTS}
        return gptq_layout.unpack_layer(tensors, bits, group_size, self.stored_less_one)

    def has_integers(self, module: str) -> bool:
        """Whether a layer's weight is stored as integers alone; those of a table lie beside its floats (`tables`)."""
        return any(f"{module}.{mark}" in self.files for mark in _MARKS)

    @cached_property
    def integer_layers(self) -> tuple[str, ...]:
        """The layers that are stored as integers, in the order of the files."""
        parted = (name.rpartition(".") for name in self.files)
        return tuple(module for module, _, mark in parted if mark in _MARKS)

    def integer_shape(self, module: str) -> tuple[int, int]:
        """[rows, columns] of one of the `integer_layers`."""
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
        """`quantization_config` of a quantized checkpoint; None for a plain one."""
        return self.config.get("quantization_config")

    @property
    def is_compressed_tensors(self) -> bool:
        """Whether its integers are laid out as `compress.models.compressed_tensors_layout` does it, or as AutoGPTQ."""
        return (self.quantization or {}).get("quant_method") == COMPRESSED_TENSORS

    @property
    def stored_less_one(self) -> bool:
        """Whether zero points are stored less one (`checkpoint_format: gptq`)."""
        return bool((self.quantization or {}).get("checkpoint_format", "gptq") == "gptq")

    def layer_settings(self, module: str) -> dict[str, Any]:
        """`bits`, `group_size` and `sym` of a quantized layer, by what the config says of the whole and of its name."""
        return layer_settings(self.quantization or {}, module)

    @cached_property
    def tables(self) -> Mapping[str, Mapping[str, int]]:
        """`bits`, `group_size` and `rows` of each table in `TABLES`, by the module's name."""
        from compress.models.safetensors_file import read_metadata

        path = self.folder / TABLES
        found: dict[str, dict[str, int]] = json.loads(read_metadata(path)["tables"]) if path.is_file() else {}
        return found

    def _table(self, module: str) -> QuantizedWeight:
        from compress.models.gptq_layout import PARTS, unpack_layer
        from compress.models.safetensors_file import read_tensor

        about = self.tables[module]
        tensors = {part: read_tensor(self.folder / TABLES, f"{module}.{part}") for part in PARTS}
        padded = unpack_layer(tensors, about["bits"], about["group_size"], stored_less_one=False)
        rows = slice(about["rows"])
        return replace(
            padded,
            integers=padded.integers[rows],
            scales=padded.scales[rows],
            zero_points=padded.zero_points[rows],
        )


@dataclass(frozen=True)
class QuantizedCheckpoint(Checkpoint):
    """A checkpoint in GPTQ format (the AutoGPTQ layout), with its embedding tables beside it."""

    kind: ClassVar[str] = "quantized checkpoint"


@dataclass(frozen=True)
class ServedCheckpoint(Checkpoint):
    """A quantized checkpoint as compressed-tensors lays it out, for servers with a GPU."""

    kind: ClassVar[str] = "served checkpoint"


_PACKED = (".qweight", ".weight_packed")
_COMPANIONS = (".qzeros", ".scales", ".g_idx", ".weight_scale", ".weight_zero_point", ".weight_shape")


def read_tensors(file: Path, root: Path) -> list[StoredTensor]:
    """The tensors of a file as the quantization config in ``root`` means them: packed weights, scales, zero points."""
    from compress.models.safetensors_file import read_header

    quantization = _quantization(root)
    return [_as_meant(tensor, layer_settings(quantization, tensor.module)["bits"]) for tensor in read_header(file)]


def _quantization(root: Path) -> dict[str, Any]:
    """What the folder's config says of a GPTQ, AWQ or compressed-tensors checkpoint; empty for any other."""
    if not (root / "config.json").is_file():
        return {}
    found = read_json(root / "config.json").get("quantization_config")
    return found if isinstance(found, dict) else {}


def _as_meant(tensor: StoredTensor, bits: object) -> StoredTensor:
    """``bits`` are those of the weights that int32 words hold several of, where the config says them."""
    if not isinstance(bits, int) or bits < 1:
        return tensor
    if tensor.name.endswith(_PACKED) and tensor.dtype == "int32":
        weights = tensor.elements * 32 // bits
        packed = {"role": "weight", "dtype": f"int{bits}", "parameters": weights, "packed": True}
        return tensor.model_copy(update=packed)
    if tensor.name.endswith(_COMPANIONS):
        return tensor.model_copy(update={"role": "quantization", "parameters": 0})
    return tensor
