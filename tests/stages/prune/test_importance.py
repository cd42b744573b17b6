"""Importance of heads and neurons against gradients of explicit gates, one unpadded example at a time."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from torch import nn

from compress.models.structure import TransformerBlock, blocks
from compress.stages.prune.stage import Prune
from compress.stages.prune.structured import _importance
from compress.tasks.inference import forward, tensors

SIZE = tiny.WIDTH // tiny.HEADS


def gated(linear: nn.Linear, gates: torch.Tensor) -> Any:
    return linear.register_forward_pre_hook(lambda _, inputs: (inputs[0] * gates,))


@pytest.mark.parametrize("architecture", ["bert", "distilbert"])
def test_importance_is_the_sum_of_absolute_gate_gradients(architecture: str):
    model, context = tiny.encoder(architecture), tiny.context(tiny.dataset(50))
    examples = context.encode("train", model)
    found: list[TransformerBlock] = blocks(model.module)
    heads = [torch.ones(tiny.HEADS, requires_grad=True) for _ in found]
    neurons = [torch.ones(tiny.NEURONS, requires_grad=True) for _ in found]
    expected = [torch.zeros_like(gates) for gates in (*heads, *neurons)]
    for index in range(len(examples)):
        hooks = [
            gated(block.require_attention().output, g.repeat_interleave(SIZE))
            for block, g in zip(found, heads, strict=True)
        ]
        hooks += [gated(block.require_feed_forward().output, g) for block, g in zip(found, neurons, strict=True)]
        batch = tensors(examples, [index])
        loss = nn.functional.cross_entropy(forward(model.module, batch).logits, batch["labels"])
        for total, gradient in zip(expected, torch.autograd.grad(loss, [*heads, *neurons]), strict=True):
            total += gradient.abs()
        for hook in hooks:
            hook.remove()
    head_scores, neuron_scores = _importance(model.module, found, Prune(heads=0.5), examples, context)
    for score, total in zip([*head_scores, *neuron_scores], expected, strict=True):
        torch.testing.assert_close(score, total, rtol=1e-3, atol=1e-4)
        assert total.std() > 0.01
