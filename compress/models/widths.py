"""Widths of a model that stages can prune, and copies with other widths for scaling measurements."""

from __future__ import annotations

import copy
from collections.abc import Collection

import torch
from torch import nn

from compress.models.structure import blocks
from compress.models.torch_model import TorchModel
from compress.models.transformer_pruning import keep_heads, keep_neurons
from compress.models.vocabulary import token_embedding
from compress.utils.errors import StageError

HEADS, NEURONS, TOKENS = "heads", "neurons", "tokens"
_MORE_TOKENS = 1009
_BLOCK = 32
"""Neurons are removed in multiples of this, so that quantization groups along them stay whole."""


def model_widths(module: nn.Module) -> dict[str, int]:
    """Return heads and neurons per layer, if all layers have the same number, and rows of the embedding table."""
    try:
        layers = blocks(module)
    except StageError:
        layers = []
    heads, neurons = {block.prunable_units for block in layers}, {block.neurons for block in layers}
    widths = {}
    # Layers of different widths have no single width.
    if len(heads) == 1:
        widths[HEADS] = heads.pop()
    if len(neurons) == 1:
        widths[NEURONS] = neurons.pop()
    table = token_embedding(module)
    if table is not None:
        widths[TOKENS] = table.num_embeddings
    return {name: width for name, width in widths.items() if width}


def copy_with_other_widths(model: TorchModel, names: Collection[str]) -> TorchModel:
    """Return a copy with fewer heads and neurons per layer and more tokens, for each of ``names``.

    Every width changes by another ratio. Widths of 1 stay. Raises `StageError` if the architecture is not supported.
    """
    # The original must not change.
    resized = TorchModel(copy.deepcopy(model.module), copy.copy(model.processor))
    module, widths = resized.module, model_widths(model.module)
    heads, neurons = widths.get(HEADS, 0), widths.get(NEURONS, 0)
    count = len(blocks(module)) if heads or neurons else 0
    if HEADS in names and heads > 1:
        keep_heads(module, [range(heads - 1)] * count)
    if NEURONS in names and neurons > 1:
        keep_neurons(module, [torch.arange(_fewer(neurons, heads))] * count)
    if TOKENS in names:
        _add_tokens(module)
    return resized


def _fewer(neurons: int, heads: int) -> int:
    """Return two thirds of the neurons, in multiples of a block if possible, at another ratio than one head less."""
    step = _BLOCK if neurons >= 3 * _BLOCK else 1
    # At least one block is removed.
    removed = max(neurons // 3 // step, 1) * step
    return neurons - (removed + step if removed * heads == neurons else removed)


def _add_tokens(module: nn.Module) -> None:
    table = token_embedding(module)
    if table is None:
        return
    weight = table.weight.detach()
    # The new rows repeat the first one.
    table.weight = nn.Parameter(torch.cat([weight, weight[:1].expand(_MORE_TOKENS, -1)]))
    table.num_embeddings += _MORE_TOKENS
    config = module.config
    assert not isinstance(config, torch.Tensor | nn.Module)
    config.vocab_size = table.num_embeddings
