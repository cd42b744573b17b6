"""What a killed run goes on from, beside the hidden states: the packed layers of each block that is done."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from compress.checkpoints.safetensors_file import read_header, read_metadata, read_tensor
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
            return layers_in(self.file(index))
        except SafetensorError:
            return None

    def store(self, index: int, tensors: Mapping[str, torch.Tensor], layers: Sequence[Layer]) -> None:
        """Keep a block's packed layers, and float tensors of it that are not the model's own any more."""
        write_whole(self.file(index), tensors, {"layers": layers_to_text(layers)})

    def names(self, index: int) -> tuple[str, ...]:
        """The tensors that are kept of a block."""
        return tuple(tensor.name for tensor in read_header(self.file(index)))

    def tensor(self, index: int, name: str) -> torch.Tensor:
        """One tensor that is kept of a block, mapped from its file."""
        return read_tensor(self.file(index), name)


def layers_to_text(layers: Sequence[Layer]) -> str:
    """Layers as JSON, for a file's metadata."""
    return json.dumps([layer.to_json() | {"bits": layer.bits} for layer in layers])


def layers_in(path: Path) -> tuple[Layer, ...]:
    """The layers that a file's metadata tell of."""
    return tuple(Layer(**layer) for layer in json.loads(read_metadata(path)["layers"]))


def write_whole(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file that has its name only once it is whole and on the disk."""
    partial = path.with_suffix(".partial")
    save_file(dict(tensors), partial, metadata=metadata)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)
