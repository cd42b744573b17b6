"""A forward pass whose last layer computes only the token that a classifier reads."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel

from compress.models.structure import Linear, TransformerBlock, blocks
from compress.models.transformer_pruning import layer_list, replaced_layers
from compress.utils.errors import StageError

BERT_FAMILIES = ("bert", "roberta", "xlm-roberta", "electra")
"""Architectures built like BERT, whose classifiers read the first token."""


class FirstTokenLayer(nn.Module):
    """A layer of BERT's kind that gives the first token's state alone, [B, 1, width], from those of all tokens."""

    def __init__(self, block: TransformerBlock) -> None:
        super().__init__()
        self._block = [block]

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor | None = None, *_: object, **__: object) -> torch.Tensor:
        """``mask`` is what attention adds or allows, [B, 1, length, length], or ``None``."""
        (block,) = self._block
        layer: Any = block.module
        first, attention = hidden[:, :1], block.require_attention()

        def by_head(states: torch.Tensor, projection: Linear) -> torch.Tensor:
            heads: torch.Tensor = projection(states).unflatten(-1, (attention.heads, attention.head_size))
            return heads.transpose(1, 2)

        attended = scaled_dot_product_attention(
            by_head(first, attention.query),
            by_head(hidden, attention.key),
            by_head(hidden, attention.value),
            attn_mask=None if mask is None else mask[:, :, :1],
            dropout_p=layer.attention.self.dropout.p if layer.training else 0.0,
        )
        return layer.feed_forward_chunk(layer.attention.output(attended.transpose(1, 2).flatten(2), first))  # type: ignore[no-any-return]


@contextlib.contextmanager
def shortened(module: PreTrainedModel, first_token: bool) -> Iterator[None]:
    """Let the last layer of ``module`` compute the first token alone while the context is open, if ``first_token``.

    Raises `StageError` for an architecture whose classifier reads other tokens too.
    """
    if not first_token:
        yield
        return
    if module.config.model_type not in BERT_FAMILIES:
        raise StageError(
            f"Whether a {module.config.model_type!r} model's classifier reads the first token alone is not known.",
            expected=f"one of {', '.join(BERT_FAMILIES)}",
            hint="leave first_token_only out",
        )
    with replaced_layers(module, [*layer_list(module)[:-1], FirstTokenLayer(blocks(module)[-1])]):
        yield
