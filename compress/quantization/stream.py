"""Calibration text on its way through the blocks: the hidden states between two of them, and how a block runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from compress.checkpoints.experts_as_stored import experts_of
from compress.environment import has_bf16
from compress.quantization.block_pass import BlockPass, gram
from compress.quantization.config import Quantization
from compress.quantization.layers import linears
from compress.quantization.skeleton import Call, Skeleton
from compress.quantization.states import States, open_states, write_states

if TYPE_CHECKING:
    from compress.quantization.importance import Importance

ACTIVATION_BYTES = 1 << 30
"""How much of a block's activations may be in memory; the calibration text is cut into batches that keep to it."""
_WIDE_TENSORS = 4
"""Tensors as wide as a block's widest layer that are alive at once: gate, its activation, up, and their product."""
_EMBEDDING_SHARE = 0.2
"""A tied table is read row by row as well, where each of its columns counts the same: the identity, relative to the
mean of the Hessian's diagonal."""


@dataclass(frozen=True)
class BlockRun:
    """The forward pass of a loaded block over ``windows`` windows, in batches that keep to `ACTIVATION_BYTES`."""

    skeleton: Skeleton
    index: int
    windows: int
    size: int
    calls: Mapping[int, Call]
    bf16: bool

    @classmethod
    def of(cls, skeleton: Skeleton, config: Quantization, index: int, ids: torch.Tensor) -> BlockRun:
        """For token ``ids`` [windows, length]; what the block is called with is found now, for any number of them."""
        size = batch_size(skeleton.blocks[index], ids)
        calls = {count: skeleton.calls(ids[:count])[index] for count in {1, size, len(ids) % size} - {0}}
        return cls(skeleton, index, len(ids), size, calls, uses_bf16(config))

    def slices(self) -> list[slice]:
        """The windows of each batch."""
        return [slice(at, min(at + self.size, self.windows)) for at in range(0, self.windows, self.size)]

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """The block's output for the hidden states of one window or of a batch, [n, length, hidden]."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            return self.skeleton.run(self.index, hidden, self.calls[len(hidden)])


@dataclass
class Stream:
    """Token ids [windows, length] through the blocks of ``skeleton``; states lie in ``folder``, one file a block.

    ``importance`` says how much each token counts for a layer; without it all count alike.
    """

    skeleton: Skeleton
    config: Quantization
    ids: torch.Tensor
    folder: Path
    importance: Importance | None = None
    states: States | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the hidden states: [windows, length, hidden]."""
        return (*self.ids.shape, self.skeleton.hidden_size)

    def path(self, index: int) -> Path:
        """Where the states that enter a block lie."""
        return self.folder / f"states-{index:05}.bin"

    def is_at(self, index: int) -> bool:
        """Whether the states that enter a block are here."""
        return States.is_whole(self.path(index), self.shape)

    def enter(self, index: int) -> States:
        """The states that enter a block: those of the first are made, all others must be here."""
        if self.states is None and index == 0:
            batches = (self.skeleton.embedded(rows) for rows in torch.split(self.ids, 1))
            self.states = write_states(self.path(0), self.shape, batches)
        elif self.states is None:
            self.states = open_states(self.path(index), self.shape)
        return self.states

    def pass_through(self, index: int, modules: dict[str, nn.Linear]) -> BlockPass:
        """A loaded block over all windows, with ``modules`` to be watched."""
        states = self.enter(index)
        # Made before any layer is watched, since finding what a block is called with may run it.
        run = BlockRun.of(self.skeleton, self.config, index, self.ids)
        batches = [partial(states.__getitem__, some) for some in run.slices()]
        name = f"{self.skeleton.prefix}.{index}"
        experts = experts_of(self.skeleton.blocks[index], name)
        counts = {} if self.importance is None else self.importance.layers
        return BlockPass(name, modules, run, batches, experts, self.config.expert_tokens, counts, run.bf16)

    def leave(self, index: int, outputs: Iterable[torch.Tensor]) -> None:
        """Keep what a block gave; `forget` what entered it once the block itself is kept."""
        self.states = write_states(self.path(index + 1), self.shape, outputs)

    def forget(self, index: int) -> None:
        """Let go of the states that entered a block."""
        self.path(index).unlink(missing_ok=True)

    def advance(self, index: int) -> None:
        """Let all windows pass a loaded block as it is."""
        work = self.pass_through(index, {})
        self.leave(index, (work.run(batch()) for batch in work.batches))
        self.forget(index)

    @torch.no_grad()
    def table_hessian(self) -> torch.Tensor:
        """The Hessian [hidden, hidden] that the head's rows are rounded under, once every block is passed.

        That of the head's inputs, and for a tied table what its rows are to the model as embeddings.
        """
        states = self.enter(len(self.skeleton.blocks))
        windows, length, width = self.shape
        total = torch.zeros(width, width)
        for at in range(windows):
            inputs, counts = self.skeleton.normed(states[at : at + 1]), None
            if self.importance is not None:
                counts = self.importance.head[at * length : (at + 1) * length]
            total.add_(gram(inputs, counts), alpha=(1.0 if counts is None else float(counts.mean())) / windows)
        if self.skeleton.tied:
            share = _EMBEDDING_SHARE * total.diagonal().mean() * torch.eye(width)
            total.add_(share if self.importance is None else self.importance.embedding)
        return total


def uses_bf16(config: Quantization) -> bool:
    """Whether matrix products run in bfloat16: asked for, or `auto` on a processor with bf16 arithmetic."""
    return config.precision == "bf16" or (config.precision == "auto" and has_bf16())


def batch_size(block: nn.Module, ids: torch.Tensor) -> int:
    """Windows at a time, so that a block's activations keep to `ACTIVATION_BYTES`."""
    widest = max(max(part.in_features, part.out_features) for part in linears(block, "").values())
    window = 4 * _WIDE_TENSORS * ids.shape[1] * widest
    return int(min(max(ACTIVATION_BYTES // window, 1), len(ids)))
