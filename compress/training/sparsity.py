"""Which layers may be sparse, and training that leaves pruned weights at zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from compress.checkpoints.plain_module import PlainModule

_PRUNED_FROM = 0.05
"""A layer with at least this share of exact zeros is taken for pruned; dense training leaves none."""


def sparse_layers(module: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """The layers of the module's base model that may lose weights, by name, in order.

    The first convolution, which reads the input, and depthwise ones hold little and stay dense, and so do heads outside
    the base model; of a plain module the head is its last layer.
    """
    plain = isinstance(module, PlainModule)
    base: Any = module.network if plain else getattr(module, "base_model", module)
    found: dict[str, nn.Linear | nn.Conv2d] = {}
    convolutions = 0
    for name, layer in base.named_modules():
        if isinstance(layer, nn.Conv2d):
            convolutions += 1
            if convolutions > 1 and layer.groups < layer.in_channels:
                found[name] = layer
        elif isinstance(layer, nn.Linear):
            found[name] = layer
    if plain and found:
        found.popitem()
    return found


def keep_zeros(module: nn.Module) -> Callable[[int, int], None] | None:
    """A hook for after each step that puts pruned weights back to zero, or ``None`` for a dense model."""
    masks = []
    for layer in sparse_layers(module).values():
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
