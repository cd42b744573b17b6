"""How wide a model is where stages cut it, and the same model a little narrower."""

from __future__ import annotations

import copy
from collections.abc import Collection

import torch
from torch import nn

from compress.models.structure import blocks
from compress.models.torch_model import TorchModel
from compress.models.transformer_pruning import keep_heads, keep_neurons
from compress.models.vocabulary import word_table
from compress.utils.errors import StageError

HEADS, NEURONS, TOKENS = "heads", "neurons", "tokens"
_MORE_TOKENS = 1009
_BLOCK = 32
"""Few-bit blocks along the neurons stay whole."""


def widths_of(module: nn.Module) -> dict[str, int]:
    """Heads and neurons of each layer, where all have as many, and rows of the table of words."""
    try:
        found = blocks(module)
    except StageError:
        found = []
    heads, neurons = {block.places for block in found}, {block.neurons for block in found}
    widths = {}
    if len(heads) == 1:
        widths[HEADS] = heads.pop()
    if len(neurons) == 1:
        widths[NEURONS] = neurons.pop()
    table = word_table(module)
    if table is not None:
        widths[TOKENS] = table.num_embeddings
    return {name: width for name, width in widths.items() if width}


def with_other_widths(model: TorchModel, names: Collection[str]) -> TorchModel:
    """A copy with fewer heads and neurons in each layer, and more tokens: each of ``names`` by a ratio of its own.

    Those of which there is but one stay. Raises `StageError` where the architecture has no place for it.
    """
    made = TorchModel(copy.deepcopy(model.module), copy.copy(model.processor))
    module, widths = made.module, widths_of(model.module)
    heads, neurons = widths.get(HEADS, 0), widths.get(NEURONS, 0)
    count = len(blocks(module)) if heads or neurons else 0
    if HEADS in names and heads > 1:
        keep_heads(module, [range(heads - 1)] * count)
    if NEURONS in names and neurons > 1:
        keep_neurons(module, [torch.arange(_fewer(neurons, heads))] * count)
    if TOKENS in names:
        _add_tokens(module)
    return made


def _fewer(neurons: int, heads: int) -> int:
    """Two thirds of the neurons, in whole blocks where there are some; never by the same ratio as the heads."""
    step = _BLOCK if neurons >= 3 * _BLOCK else 1
    gone = max(neurons // 3 // step, 1) * step
    return neurons - (gone + step if gone * heads == neurons else gone)


def _add_tokens(module: nn.Module) -> None:
    table = word_table(module)
    if table is None:
        return
    weight = table.weight.detach()
    table.weight = nn.Parameter(torch.cat([weight, weight[:1].expand(_MORE_TOKENS, -1)]))
    table.num_embeddings += _MORE_TOKENS
    config = module.config
    assert not isinstance(config, torch.Tensor | nn.Module)
    config.vocab_size = table.num_embeddings
