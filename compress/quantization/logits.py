"""What a checkpoint answers, quantized or not, with one block in memory at a time."""

from __future__ import annotations

import torch

from compress.checkpoints.checkpoint import Checkpoint
from compress.quantization.build import build_skeleton
from compress.quantization.skeleton import Skeleton


@torch.no_grad()
def logits(checkpoint: Checkpoint, ids: torch.Tensor) -> torch.Tensor:
    """Logits [n, length, vocabulary] in float32 of token ids [n, length], which are all of them text, no padding.

    Quantized layers count with the weights that their integers stand for. Raises `ModelError` for ids outside the
    vocabulary and `StageError` for an architecture whose blocks cannot be run by themselves.
    """
    skeleton = build_skeleton(checkpoint)
    return skeleton.logits(last_hidden(skeleton, ids))


@torch.no_grad()
def last_hidden(skeleton: Skeleton, ids: torch.Tensor) -> torch.Tensor:
    """The output of the last block, [n, length, hidden], before the last norm."""
    calls = skeleton.calls(ids)
    hidden = skeleton.embedded(ids)
    for index, call in enumerate(calls):
        skeleton.load(index)
        hidden = skeleton.run(index, hidden, call)
        skeleton.unload(index)
    return hidden
