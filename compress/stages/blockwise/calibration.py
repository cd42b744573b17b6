"""Calibration text: token sequences of the train split, and their hidden states between blocks on disk.

Hidden states are stored instead of recomputed from finished blocks, so that a killed run resumes at no cost and with
identical bits. Only the states that enter the current block exist.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from compress.models.checkpoint import Checkpoint
from compress.models.experts import find_separate_experts
from compress.models.hooks import TensorCallback, capture_inputs
from compress.models.processor import load_tokenizer
from compress.models.safetensors_file import write_whole
from compress.stages.base import Context
from compress.stages.blockwise.block_pass import BlockPass, gram
from compress.stages.blockwise.blockwise_model import BlockwiseModel, Call
from compress.stages.blockwise.layers import linears
from compress.stages.gptq.settings import Quantization
from compress.utils.errors import DataError, ModelError
from compress.utils.torch_device import CPU, autocast, device_uses_bf16

_SPLIT = "train"
_MONOTONOUS = 0.9
"""Share of a single token above which the text is rejected."""


def calibration_sequences(context: Context, checkpoint: Checkpoint, samples: int, length: int) -> torch.Tensor:
    """Return token ids [samples, length], sampled with the recipe's seed, in the order of the text.

    Args:
        context: Context of the stage, whose train split is read.
        checkpoint: Checkpoint with the tokenizer.
        samples: Number of sequences.
        length: Tokens of a sequence.

    Raises:
        DataError: If the text is too short or repeats one token.
        ModelError: If the tokenizer returns ids that the model lacks.
    """
    tokenizer = load_tokenizer(checkpoint.folder)
    rows = context.data.split(_SPLIT)
    examples = context.task.encode(rows, tokenizer, None, length)
    windows = [example["input_ids"] for example in examples.inputs if len(example["input_ids"]) == length]
    if len(windows) < samples:
        raise DataError(
            f"The calibration text is too short: it gives {len(windows)} windows of {length} tokens.",
            where=f"data.splits.{_SPLIT}",
            expected=f"{samples} windows, {samples * length:,} tokens",
            hint=f"give more text, or lower samples{f' to {len(windows)}' if windows else ''} or sequence_length",
        )
    chosen = np.sort(np.random.default_rng(context.seed).choice(len(windows), samples, replace=False))
    ids = torch.from_numpy(np.stack([windows[index] for index in chosen]))
    # Text of one repeated token would leave most inputs of a layer unused.
    values, counts = torch.unique(ids, return_counts=True)
    share = int(counts.max()) / ids.numel()
    if share > _MONOTONOUS:
        token = tokenizer.convert_ids_to_tokens(int(values[counts.argmax()]))
        raise DataError(
            f"{share:.0%} of the calibration text is the one token {token!r}.",
            where=f"data.splits.{_SPLIT}",
            expected="ordinary text, so that every input of a layer is seen at work",
        )
    vocabulary_size = checkpoint.config.get("vocab_size")
    if isinstance(vocabulary_size, int) and int(values.max()) >= vocabulary_size:
        raise ModelError(
            f"The tokenizer gives the id {int(values.max())}; the model's vocabulary has {vocabulary_size}.",
            where=str(checkpoint.folder),
            expected="the tokenizer that the model was trained with",
        )
    return ids


ACTIVATION_BYTES = 1 << 30
"""Limit for a block's activations in memory, which determines the batch size."""
_WIDE_TENSORS = 4
"""Number of tensors as wide as a block's widest layer that exist at once: gate, its activation, up, their product."""


@dataclass(frozen=True)
class BlockRun:
    """Forward pass of a loaded block over ``windows`` sequences, in batches within `ACTIVATION_BYTES`."""

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
        """Prepare a block's run for token ``ids`` [sequences, length]; its call arguments are computed once.

        Args:
            decoder: Model that has the block.
            config: Settings with the precision.
            index: Index of the block.
            ids: Token ids [sequences, length].
            size: Sequences of a batch; by default as many as fit.
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
    """Return the number of sequences for which a block's activations stay within `ACTIVATION_BYTES`."""
    widest = max(max(part.in_features, part.out_features) for part in linears(block, "").values())
    window = 4 * _WIDE_TENSORS * ids.shape[1] * widest
    return int(min(max(ACTIVATION_BYTES // window, 1), len(ids)))


@dataclass(frozen=True)
class States:
    """Hidden states [sequences, length, hidden] float32 in the file ``path``, loaded to ``device``."""

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
        """Write batches as they arrive; the file gets its name only after all of it is on disk."""
        partial = self.path.with_suffix(".partial")
        with partial.open("wb") as file:
            for batch in batches:
                # Not numpy's tofile, whose error on a full disk does not say that it is full.
                file.write(batch.detach().float().cpu().contiguous().numpy().data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self.path)
        return self


_EMBEDDING_SHARE = 0.2
"""Weight of the identity in the Hessian of a tied table, relative to the mean of its diagonal.

Rows of a tied table are also read as embeddings, where every column counts the same.
"""


@dataclass
class CalibrationActivations:
    """Hidden states of token ids [sequences, length] between the blocks of ``decoder``, in files of ``folder``.

    ``importance`` has the weight of each token for a layer; without it all tokens count alike.
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
        """Store the outputs of a block. Call `forget` for its inputs once the block itself is stored."""
        self.entering(index + 1).write(outputs)

    def forget(self, index: int) -> None:
        """Delete the states that entered a block."""
        self.entering(index).path.unlink(missing_ok=True)

    def pass_as_it_is(self, index: int) -> None:
        """Pass all sequences through a loaded block, and keep the states that enter and leave it."""
        self.pass_watched(index, {}, lambda name, inputs: None)

    def pass_watched(self, index: int, modules: dict[str, nn.Linear], on_input: TensorCallback[str]) -> None:
        """Pass all sequences through a block and call ``on_input`` with the name and input of each of ``modules``."""
        work = self.pass_through(index, modules)
        with capture_inputs(modules, on_input):
            self.leave(index, (work.run(batch()) for batch in work.batches))

    def advance(self, index: int) -> None:
        """Pass all sequences through a loaded block and delete its inputs."""
        self.pass_as_it_is(index)
        self.forget(index)

    def as_float(self, folder: str) -> CalibrationActivations:
        """Return activations of the same text for the unquantized blocks, stored in a ``folder`` inside this one's."""
        (self.folder / folder).mkdir(exist_ok=True)
        return replace(self, folder=self.folder / folder, importance=None)

    @torch.no_grad()
    def table_hessian(self) -> torch.Tensor:
        """Return the Hessian [hidden, hidden] under which the head's rows are rounded, after all blocks.

        It is the Hessian of the head's inputs, plus a term for the rows of a tied table in their role as embeddings.
        """
        states = self.entering(len(self.decoder.blocks))
        windows, length, width = states.shape
        total = torch.zeros(width, width, device=states.device)
        for row in range(windows):
            inputs, counts = self.decoder.normed(states[row : row + 1]), None
            if self.importance is not None:
                counts = self.importance.head[row * length : (row + 1) * length].to(inputs.device)
            total.add_(gram(inputs, counts), alpha=(1.0 if counts is None else float(counts.mean())) / windows)
        # A tied table is also read row by row as embeddings.
        if self.decoder.tied:
            share = _EMBEDDING_SHARE * total.diagonal().mean() * torch.eye(width, device=total.device)
            total.add_(share if self.importance is None else self.importance.embedding.to(total.device))
        return total


@dataclass(frozen=True)
class Importance:
    """Weights of tokens: ``layers[name]`` [tokens] float32 with mean 1; layers of experts have none.

    ``head`` [tokens] float32 are the weights for the logits, 1 - sum p^2. ``embedding`` [hidden, hidden] is the mean
    outer product of the loss's gradient with respect to the table's rows. Both have the same unit, so that a tied table
    can weigh its two uses.
    """

    layers: Mapping[str, torch.Tensor]
    head: torch.Tensor
    embedding: torch.Tensor

    def write(self, path: Path) -> None:
        """Write the weights to a file, for a run that resumes."""
        layers = {f"layers.{name}": weights for name, weights in self.layers.items()}
        write_whole(path, layers | {"head": self.head, "embedding": self.embedding}, {})

    @staticmethod
    def read(path: Path) -> Importance:
        """Read a file written by `write`."""
        tensors = load_file(path)
        layers = {name.removeprefix("layers."): tensors[name] for name in tensors if name.startswith("layers.")}
        return Importance(layers, tensors["head"], tensors["embedding"])
