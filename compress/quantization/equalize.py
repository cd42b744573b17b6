"""Equalizing a checkpoint block by block: the same function, in weights that few bits hold better."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from compress.cache import storage_errors
from compress.checkpoints.checkpoint import Checkpoint
from compress.checkpoints.shards import write_shards
from compress.errors import StageError
from compress.numerics.equalization import equalizing
from compress.quantization.build import build_skeleton, check_not_quantized
from compress.quantization.folds import Fold, find_folds
from compress.quantization.skeleton import Skeleton
from compress.quantization.write import SHARD_BYTES, write_beside_weights

if TYPE_CHECKING:
    from compress.stage.stage import Context

_TOKENS = 16


def equalize_checkpoint(checkpoint: Checkpoint, strength: float, context: Context) -> Checkpoint:
    """The equalized checkpoint, in the context's scratch folder; what was changed is stored in float32.

    Raises `StageError` where nothing could be equalized, and `ModelError` as `build_skeleton` does.
    """
    check_not_quantized(checkpoint)
    work = _Work(build_skeleton(checkpoint), strength, context)
    folder = context.scratch / "equalized"
    with storage_errors(context.scratch):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_beside_weights(checkpoint, folder, dtype="float32")
        write_shards(folder, work.tensors(), SHARD_BYTES)
    context.remark(work.summary())
    return Checkpoint(folder)


@dataclass
class _Work:
    skeleton: Skeleton
    strength: float
    context: Context
    folds: int = 0
    alone: list[str] = field(default_factory=list)

    @torch.no_grad()
    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor of the new checkpoint, those of changed layers first."""
        done: set[str] = set()
        blocks = range(len(self.skeleton.blocks))
        for index in self.context.progress.track(blocks, "equalizing blocks", len(blocks)):
            for name, tensor in self._block(index):
                done.add(name)
                yield name, tensor
        if not self.folds:
            raise StageError(
                "Nothing could be equalized: no norm or layer makes the inputs of a linear layer alone.",
                expected="an architecture such as Llama, Qwen, Mistral, Gemma or Phi",
                mend="leave the stage out",
            )
        for name in self.skeleton.checkpoint.files:
            if name not in done:
                yield name, self.skeleton.checkpoint.stored(name)

    def _block(self, index: int) -> Iterator[tuple[str, torch.Tensor]]:
        block, prefix = self.skeleton.load(index), f"{self.skeleton.prefix}.{index}"
        modules = {name: part for name, part in block.named_modules() if name}
        call = self.skeleton.calls(torch.arange(_TOKENS)[None] % self.skeleton.vocabulary)[index]
        config, width = self.skeleton.model.config.get_text_config(), self.skeleton.hidden_size
        generator = torch.Generator().manual_seed(index)
        hidden = torch.randn(1, _TOKENS, width, generator=generator)
        head_size = getattr(config, "head_dim", None) or width // config.num_attention_heads
        folds, alone = find_folds(modules, lambda: self.skeleton.run(index, hidden, call), head_size)
        self.folds += len(folds)
        self.alone += [f"{prefix}.{name}" for name in alone]
        for fold, factors in [(fold, self._factors(fold, modules)) for fold in folds]:
            fold.scale(modules, factors)
            fold.take_back(modules, factors)
        changed = {name for fold in folds for name in (*fold.consumers, fold.source)}
        for name in sorted(changed):
            for leaf, parameter in modules[name].named_parameters(recurse=False):
                yield f"{prefix}.{name}.{leaf}", parameter.data.clone()
        self.skeleton.unload(index)

    def _factors(self, fold: Fold, modules: dict[str, torch.nn.Module]) -> torch.Tensor:
        weights = [modules[name].get_parameter("weight").data for name in fold.consumers]
        return equalizing(weights, self.strength, fold.places)

    def summary(self) -> str:
        """What was done, and which layers were left as they are."""
        left = f"; as they were: {len(self.alone)} layers such as {self.alone[0]}" if self.alone else ""
        return f"equalize: {self.folds} groups of layers with alike columns{left}"
