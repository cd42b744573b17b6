"""Calibration text on its way through the blocks: the hidden states between two of them, and how a block runs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from compress.environment import has_bf16
from compress.models.experts_as_stored import experts_of
from compress.quantization.block_pass import BlockPass, gram
from compress.quantization.config import Quantization
from compress.quantization.layers import linears
from compress.quantization.skeleton import Skeleton
from compress.quantization.states import States, open_states, write_states

ACTIVATION_BYTES = 1 << 30
"""How much of a block's activations may be in memory; the calibration text is cut into batches that keep to it."""
_WIDE_TENSORS = 4
"""Tensors as wide as a block's widest layer that are alive at once: gate, its activation, up, and their product."""


@dataclass
class Stream:
    """Token ids [windows, length] through the blocks of ``skeleton``; states lie in ``folder``, one file a block."""

    skeleton: Skeleton
    config: Quantization
    ids: torch.Tensor
    folder: Path
    states: States | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the hidden states: [windows, length, hidden]."""
        width = self.skeleton.model.config.get_text_config().hidden_size
        return (*self.ids.shape, width)

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
        size = batch_size(self.skeleton.blocks[index], self.ids)
        # Found before any layer is watched, since finding them may run a block.
        counts = {1, size, len(self.ids) % size} - {0}
        calls = {count: self.skeleton.calls(self.ids[:count])[index] for count in counts}

        def run(hidden: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=uses_bf16(self.config)):
                return self.skeleton.run(index, hidden, calls[len(hidden)])

        batches = [partial(states.__getitem__, slice(at, at + size)) for at in range(0, len(self.ids), size)]
        name = f"{self.skeleton.prefix}.{index}"
        experts = experts_of(self.skeleton.blocks[index], name)
        return BlockPass(name, modules, run, batches, experts, self.config.expert_tokens)

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
    def head_hessian(self) -> torch.Tensor:
        """The Hessian of the head's inputs, [hidden, hidden], once every block is passed."""
        states = self.enter(len(self.skeleton.blocks))
        count, _, width = self.shape
        total = torch.zeros(width, width)
        for at in range(count):
            total.add_(gram(self.skeleton.normed(states[at : at + 1])), alpha=1 / count)
        return total


def uses_bf16(config: Quantization) -> bool:
    """Whether matrix products run in bfloat16: asked for, or `auto` on a processor with bf16 arithmetic."""
    return config.precision == "bf16" or (config.precision == "auto" and has_bf16())


def batch_size(block: nn.Module, ids: torch.Tensor) -> int:
    """Windows at a time, so that a block's activations keep to `ACTIVATION_BYTES`."""
    widest = max(max(part.in_features, part.out_features) for part in linears(block, "").values())
    window = 4 * _WIDE_TENSORS * ids.shape[1] * widest
    return int(min(max(ACTIVATION_BYTES // window, 1), len(ids)))
