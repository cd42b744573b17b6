"""Calibration text on its way through the blocks: the hidden states between two of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from compress.models.experts import find_separate_experts
from compress.models.hooks import TensorCallback, capture_inputs
from compress.stages.blockwise.block_pass import BlockPass, gram
from compress.stages.blockwise.blockwise_model import BlockwiseModel
from compress.stages.blockwise.states import BlockRun, States
from compress.stages.gptq.settings import Quantization
from compress.stages.gptq.token_weighting import Importance

_EMBEDDING_SHARE = 0.2
"""A tied table is read row by row as well, where each of its columns counts the same: the identity, relative to the
mean of the Hessian's diagonal."""


@dataclass
class CalibrationActivations:
    """Token ids [windows, length] through the blocks of ``decoder``; states lie in ``folder``, one file a block.

    ``importance`` says how much each token counts for a layer; without it all count alike.
    """

    decoder: BlockwiseModel
    config: Quantization
    ids: torch.Tensor
    folder: Path
    importance: Importance | None = None

    def entering(self, index: int) -> States:
        """Return the hidden states that enter a block, computed or not."""
        shape = (*self.ids.shape, self.decoder.hidden_size)
        return States(self.folder / f"states-{index:05}.bin", shape, self.decoder.device)

    def pass_through(self, index: int, modules: dict[str, nn.Linear]) -> BlockPass:
        """Return a pass of a loaded block over all sequences that watches ``modules``."""
        states = self.entering(index)
        if index == 0:
            states.write(self.decoder.embedded(rows) for rows in torch.split(self.ids, 1))
        # Made before any layer is watched, since finding what a block is called with may run it.
        run = BlockRun.of(self.decoder, self.config, index, self.ids)
        batches = [partial(states.__getitem__, some) for some in run.slices()]
        name = f"{self.decoder.prefix}.{index}"
        experts = find_separate_experts(self.decoder.blocks[index], name)
        counts = {} if self.importance is None else self.importance.layers
        return BlockPass(name, modules, run, batches, experts, self.config.expert_tokens, counts, run.bf16)

    def leave(self, index: int, outputs: Iterable[torch.Tensor]) -> None:
        """Keep what a block gave; `forget` what entered it once the block itself is kept."""
        self.entering(index + 1).write(outputs)

    def forget(self, index: int) -> None:
        """Let go of the states that entered a block."""
        self.entering(index).path.unlink(missing_ok=True)

    def pass_as_it_is(self, index: int) -> None:
        """Let all windows pass a loaded block, and keep what enters and what leaves it."""
        self.pass_watched(index, {}, lambda name, inputs: None)

    def pass_watched(self, index: int, modules: dict[str, nn.Linear], told: TensorCallback[str]) -> None:
        """Pass all sequences through a block and call ``told`` with the name and input of each of ``modules``."""
        work = self.pass_through(index, modules)
        with capture_inputs(modules, told):
            self.leave(index, (work.run(batch()) for batch in work.batches))

    def advance(self, index: int) -> None:
        """Let all windows pass a loaded block as it is."""
        self.pass_as_it_is(index)
        self.forget(index)

    def as_float(self, folder: str) -> CalibrationActivations:
        """Return activations of the same text for the unquantized blocks, stored in a ``folder`` inside this one's."""
        (self.folder / folder).mkdir(exist_ok=True)
        return replace(self, folder=self.folder / folder, importance=None)

    @torch.no_grad()
    def table_hessian(self) -> torch.Tensor:
        """Return the Hessian [hidden, hidden] that the head's rows are rounded under, after all blocks.

        That of the head's inputs, and for a tied table what its rows are to the model as embeddings.
        """
        states = self.entering(len(self.decoder.blocks))
        windows, length, width = states.shape
        total = torch.zeros(width, width, device=states.device)
        for at in range(windows):
            inputs, counts = self.decoder.normed(states[at : at + 1]), None
            if self.importance is not None:
                counts = self.importance.head[at * length : (at + 1) * length].to(inputs.device)
            total.add_(gram(inputs, counts), alpha=(1.0 if counts is None else float(counts.mean())) / windows)
        if self.decoder.tied:
            share = _EMBEDDING_SHARE * total.diagonal().mean() * torch.eye(width, device=total.device)
            total.add_(share if self.importance is None else self.importance.embedding.to(total.device))
        return total
