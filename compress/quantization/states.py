"""The hidden states between two blocks, in a file of their own, so that a killed run can go on from them.

They are kept rather than made again from the blocks that are done: going on then costs nothing, and they are the same
bits. Only those that enter the block at work exist; up to `MEMORY_BYTES` they are held in memory as well.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

MEMORY_BYTES = 1 << 28


@dataclass(frozen=True)
class States:
    """[windows, length, hidden] float32 in ``path``; ``held`` has them too where they are small."""

    path: Path
    shape: tuple[int, int, int]
    held: torch.Tensor | None = None

    def __getitem__(self, windows: slice) -> torch.Tensor:
        """The hidden states of some windows."""
        if self.held is not None:
            return self.held[windows]
        start, stop, _ = windows.indices(self.shape[0])
        window = self.shape[1] * self.shape[2]
        values = np.fromfile(self.path, np.float32, (stop - start) * window, offset=4 * start * window)
        return torch.from_numpy(values).view(stop - start, *self.shape[1:])

    @staticmethod
    def is_whole(path: Path, shape: tuple[int, int, int]) -> bool:
        """Whether ``path`` holds hidden states of that shape."""
        return path.is_file() and path.stat().st_size == 4 * shape[0] * shape[1] * shape[2]


def open_states(path: Path, shape: tuple[int, int, int]) -> States:
    """What `write_states` wrote."""
    states = States(path, shape)
    small = path.stat().st_size <= MEMORY_BYTES
    return States(path, shape, states[:] if small else None)


def write_states(path: Path, shape: tuple[int, int, int], batches: Iterable[torch.Tensor]) -> States:
    """Write hidden states as they come; the file has its name only once it is whole."""
    partial = path.with_suffix(".partial")
    small = 4 * shape[0] * shape[1] * shape[2] <= MEMORY_BYTES
    held: list[torch.Tensor] = []
    with partial.open("wb") as file:
        for batch in batches:
            values = batch.detach().float().contiguous()
            # Not numpy's tofile, whose error on a full disk does not say that it is full.
            file.write(values.numpy().data)
            if small:
                held.append(values)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    return States(path, shape, torch.cat(held) if small else None)
