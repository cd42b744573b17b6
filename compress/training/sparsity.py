"""Training that leaves pruned weights at zero."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

_PRUNED_FROM = 0.05
"""A linear layer with at least this share of exact zeros is taken for pruned; dense training leaves none."""


def linear_layers(module: nn.Module) -> list[nn.Linear]:
    """The linear layers of the module's base model, in order; heads outside it stay dense."""
    base = getattr(module, "base_model", module)
    return [layer for layer in base.modules() if isinstance(layer, nn.Linear)]


def keep_zeros(module: nn.Module) -> Callable[[int, int], None] | None:
    """A hook for after each step that puts pruned weights back to zero, or ``None`` for a dense model."""
    masks = []
    for layer in linear_layers(module):
        kept = layer.weight.detach() != 0
        if 1 - kept.float().mean().item() >= _PRUNED_FROM:
            masks.append((layer, kept))
    if not masks:
        return None

    @torch.no_grad()
    def restore(step: int, steps: int) -> None:
        for layer, kept in masks:
            layer.weight.mul_(kept)

    return restore
