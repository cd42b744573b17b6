"""GPT-2's `Conv1D` layers as linear layers: stored float weights are transposed, stored integers are not."""

from __future__ import annotations

from typing import Any

from torch import nn


class TransposedLinear(nn.Linear):
    """Linear layer whose float weight is stored as [in_features, out_features]."""


def linear_for_conv1d(model: Any) -> frozenset[str]:
    """Replace every `Conv1D` by a `TransposedLinear` on the meta device, in place, and return their names."""
    from transformers.pytorch_utils import Conv1D

    convolutions = {name: part for name, part in model.named_modules() if isinstance(part, Conv1D)}
    for name, part in convolutions.items():
        # Replace the module in its parent.
        owner, _, leaf = name.rpartition(".")
        replacement = TransposedLinear(part.nx, part.nf, bias=part.bias is not None, device="meta")
        setattr(model.get_submodule(owner), leaf, replacement.requires_grad_(False))
    return frozenset(convolutions)
