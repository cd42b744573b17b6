"""What a killed run goes on from, beside the hidden states: the packed layers of each block that is done."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from compress.quantization.layers import Layer


@dataclass(frozen=True)
class Finished:
    """The blocks that are done, in ``folder``; a file has its name only once it is whole and on the disk."""

    folder: Path

    def file(self, index: int) -> Path:
        """Where the layers of a block lie."""
        return self.folder / f"block-{index:05}.safetensors"

    def count(self, blocks: int) -> int:
        """How many blocks are done, from the first on."""
        return next((index for index in range(blocks) if self.layers(index) is None), blocks)

    def layers(self, index: int) -> tuple[Layer, ...] | None:
        """What was found of a block's layers; None where it is not done."""
        if not self.file(index).is_file():
            return None
        try:
            with safe_open(self.file(index), framework="pt") as file:
                return tuple(Layer(**layer) for layer in json.loads(file.metadata()["layers"]))
        except SafetensorError:
            return None

    def store(self, index: int, tensors: Mapping[str, torch.Tensor], layers: Sequence[Layer]) -> None:
        """Keep a block's packed layers, and float tensors of it that are not the model's own any more."""
        write_whole(self.file(index), tensors, {"layers": layers_to_text(layers)})

    def names(self, index: int) -> tuple[str, ...]:
        """The tensors that are kept of a block."""
        with safe_open(self.file(index), framework="pt") as file:
            return tuple(file.keys())

    def tensor(self, index: int, name: str) -> torch.Tensor:
        """One tensor that is kept of a block, mapped from its file."""
        return mapped(self.file(index), name)


def layers_to_text(layers: Sequence[Layer]) -> str:
    """Layers as JSON, which `Layer(**entry)` reads."""
    return json.dumps([layer.to_json() | {"bits": layer.bits} for layer in layers])


def write_whole(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file that has its name only once it is whole and on the disk."""
    partial = path.with_suffix(".partial")
    save_file(dict(tensors), partial, metadata=metadata)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)


def mapped(path: Path, name: str) -> torch.Tensor:
    """One tensor of a safetensors file, read as it is used."""
    with safe_open(path, framework="pt") as file:
        tensor: torch.Tensor = file.get_tensor(name)
        return tensor


def metadata(path: Path) -> dict[str, Any]:
    """What a safetensors file says of itself."""
    with safe_open(path, framework="pt") as file:
        found: dict[str, Any] = file.metadata()
        return found
