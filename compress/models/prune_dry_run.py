"""Dry run of pruning on a model without weights, before a run starts work."""

from __future__ import annotations

import copy
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from compress.models.config_checks import load_error_types
from compress.models.model import TorchModel
from compress.models.structure import blocks, stacks
from compress.models.transformer_pruning import (
    check_heads_prunable,
    keep_heads,
    keep_layers,
    keep_neurons,
    remaining_count,
)
from compress.models.vocabulary import token_embedding
from compress.utils.errors import ModelError, StageError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_prunable(folder: Path, *, layers: bool, heads: float, neurons: float) -> None:
    """Prune a layer, and shares of heads and neurons, of the model of ``folder``'s config.json on the meta device.

    Models without a class in transformers are skipped: loading them reports the error.

    Args:
        folder: Model folder.
        layers: Whether layers are pruned.
        heads: Share of each block's attention heads.
        neurons: Share of each block's feed-forward neurons.

    Raises:
        StageError: If a part is not supported, none would be left, or a share is too small to remove anything.
    """
    module = _hollow(folder)
    # Loading the model reports the error later.
    if module is None:
        return
    count = sum(map(len, stacks(module).values())) if layers else 0
    # Some layers, such as the first, may be required: try each one, and raise the error of the last.
    for index in range(count):
        try:
            keep_layers(copy.deepcopy(module), [other for other in range(count) if other != index])
            break
        except StageError:
            if index == count - 1:
                raise
    if heads:
        check_heads_prunable(module)
    parameters = sum(parameter.numel() for parameter in module.parameters())
    prune_last_parts(module, 0, heads, neurons)
    # A share may be too small to remove anything.
    if (heads or neurons) and not layers and sum(parameter.numel() for parameter in module.parameters()) == parameters:
        shares = {"heads": heads, "feed_forward": neurons}
        raise StageError(
            f"{' and '.join(f'{name} {share:g}' for name, share in shares.items() if share)} would remove nothing.",
            expected="a share of at least one head or neuron per layer",
            hint="remove a larger share",
        )


def prune_last_parts(module: Any, layers: int, heads: float, neurons: float) -> None:
    """Prune the last layers, heads and neurons in place: the sizes that `prune` yields, without data.

    Args:
        module: Model to prune.
        layers: Number of layers to remove.
        heads: Share of each block's heads.
        neurons: Share of each block's neurons.

    Raises:
        StageError: If a part is not supported or none would be left.
    """
    if layers:
        keep_layers(module, list(range(sum(map(len, stacks(module).values())) - layers)))
    layer_blocks = blocks(module) if heads or neurons else []
    if heads:
        keep_heads(
            module, [range(remaining_count(block.prunable_units, heads, "attention heads")) for block in layer_blocks]
        )
    if neurons:
        counts = [remaining_count(block.neurons, neurons, "feed-forward neurons") for block in layer_blocks]
        keep_neurons(module, [torch.arange(count) for count in counts])


def check_layer_selection(folder: Path, kept: tuple[int, ...]) -> None:
    """Keep only the layers ``kept`` of the model of ``folder``'s config. Raises `StageError` if that is impossible."""
    module = _hollow(folder)
    if module is not None:
        keep_layers(module, kept)


def _hollow(folder: Path) -> PreTrainedModel:
    """Return the model without weights and head, or None if transformers has no class for it."""
    from transformers import AutoConfig, AutoModel

    if not (folder / "config.json").is_file():
        return None
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except load_error_types():
        return None
    # Only architectures of transformers can be built from a config alone.
    if type(config) not in AutoModel._model_mapping:
        return None
    try:
        with torch.device("meta"):
            return AutoModel.from_config(config)
    except load_error_types() as error:
        raise ModelError(
            f"transformers cannot build a model from this config: {first_line(error)}",
            where=str(folder / "config.json"),
            expected="an architecture that transformers knows, with the fields that it needs",
        ) from error


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
        # Keep two thirds of the neurons, in multiples of a block if possible.
        step = _BLOCK if neurons >= 3 * _BLOCK else 1
        # At least one block is removed.
        removed = max(neurons // 3 // step, 1) * step
        # The ratio must differ from that of removing one head, so that the two effects can be separated.
        if removed * heads == neurons:
            removed += step
        keep_neurons(module, [torch.arange(neurons - removed)] * count)
    table = token_embedding(module)
    if TOKENS in names and table is not None:
        # The new rows repeat the first one.
        weight = table.weight.detach()
        table.weight = nn.Parameter(torch.cat([weight, weight[:1].expand(_MORE_TOKENS, -1)]))
        table.num_embeddings += _MORE_TOKENS
        module.config.vocab_size = table.num_embeddings
    return resized
