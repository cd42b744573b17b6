"""Hidden states between two blocks, on the disk, and the forward pass of a block over them.

States are kept rather than made again from the blocks that are done: a killed run goes on at no cost, with the same
bits. Only those that enter the block at work exist.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from compress.stages.blockwise.blockwise_model import BlockwiseModel, Call
from compress.stages.blockwise.layers import linears
from compress.stages.gptq.settings import Quantization
from compress.utils.torch_device import CPU, autocast, device_uses_bf16

ACTIVATION_BYTES = 1 << 30
"""How much of a block's activations may be in memory; the calibration text is cut into batches that keep to it."""
_WIDE_TENSORS = 4
"""Tensors as wide as a block's widest layer that are alive at once: gate, its activation, up, and their product."""


@dataclass(frozen=True)
class BlockRun:
    """The forward pass of a loaded block over ``windows`` windows, in batches that keep to `ACTIVATION_BYTES`."""

    decoder: BlockwiseModel
    index: int
    windows: int
    size: int
    calls: Mapping[int, Call]
    bf16: bool

    @classmethod
    def of(
        cls, decoder: BlockwiseModel, config: Quantization, index: int, ids: torch.Tensor, size: int | None = None
    ) -> BlockRun:
        """Prepare a block's run for token ``ids`` [windows, length]; its call arguments are computed once.

        Batches have ``size`` windows where that is given.
        """
        size = size or batch_size(decoder.blocks[index], ids)
        calls = {count: decoder.calls(ids[:count])[index] for count in {1, size, len(ids) % size} - {0}}
        return cls(decoder, index, len(ids), size, calls, device_uses_bf16(config.precision, decoder.device))

    def slices(self) -> list[slice]:
        """Return the sequences of each batch."""
        return [slice(at, min(at + self.size, self.windows)) for at in range(0, self.windows, self.size)]

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the block's output for the hidden states of one sequence or of a batch, [n, length, hidden]."""
        with autocast(self.bf16, self.decoder.device):
            return self.decoder.run(self.index, hidden, self.calls[len(hidden)])


def batch_size(block: nn.Module, ids: torch.Tensor) -> int:
    """Windows at a time, so that a block's activations keep to `ACTIVATION_BYTES`."""
    widest = max(max(part.in_features, part.out_features) for part in linears(block, "").values())
    window = 4 * _WIDE_TENSORS * ids.shape[1] * widest
    return int(min(max(ACTIVATION_BYTES // window, 1), len(ids)))


@dataclass(frozen=True)
class States:
    """[windows, length, hidden] float32 in ``path``, to be computed with on ``device``."""

    path: Path
    shape: tuple[int, int, int]
    device: str = CPU

    def __getitem__(self, windows: slice) -> torch.Tensor:
        """Return the hidden states of some sequences."""
        start, stop, _ = windows.indices(self.shape[0])
        window = self.shape[1] * self.shape[2]
        values = np.fromfile(self.path, np.float32, (stop - start) * window, offset=4 * start * window)
        return torch.from_numpy(values).view(stop - start, *self.shape[1:]).to(self.device)

    @property
    def are_whole(self) -> bool:
        """Return whether the file holds the states of all sequences."""
        return self.path.is_file() and self.path.stat().st_size == 4 * self.shape[0] * self.shape[1] * self.shape[2]

    def write(self, batches: Iterable[torch.Tensor]) -> States:
        """Write them as they come; the file has its name only once it is whole."""
        partial = self.path.with_suffix(".partial")
        with partial.open("wb") as file:
            for batch in batches:
                # Not numpy's tofile, whose error on a full disk does not say that it is full.
                file.write(batch.detach().float().cpu().contiguous().numpy().data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self.path)
        return self
