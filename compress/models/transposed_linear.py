"""GPT-2's `Conv1D` layers as linear ones: files have their weights transposed, but integers as of any linear layer."""

from __future__ import annotations

from typing import Any

from torch import nn


class TransposedLinear(nn.Linear):
    """A linear layer whose float weight lies in files as [in_features, out_features]."""


def linear_for_conv1d(model: Any) -> frozenset[str]:
    """Put a `TransposedLinear` without weights in place of every `Conv1D`, in place; returns their names."""
    from transformers.pytorch_utils import Conv1D

    found = {name: part for name, part in model.named_modules() if isinstance(part, Conv1D)}
    for name, part in found.items():
        owner, _, leaf = name.rpartition(".")
        made = TransposedLinear(part.nx, part.nf, bias=part.bias is not None, device="meta")
        setattr(model.get_submodule(owner), leaf, made.requires_grad_(False))
    return frozenset(found)
