"""Test pruning of heads, neurons and layers.

The outputs of a pruned model must equal those of the original with the removed weights set to zero or the removed layer
skipped, also after saving and loading.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import tiny_decoders
import tiny_encoder_decoders
import tiny_encoders
import torch
from torch import nn
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D
from trials import Trial

from compress.models.structure import Linear, blocks, in_features, stacks
from compress.models.transformer_pruning import check_heads_prunable, keep_heads, keep_layers, keep_neurons, load_pruned
from compress.utils.errors import CompressError, StageError, first_line

_TOLERANCE = 1e-4
"""Largest difference, relative to the standard deviation of the original outputs."""
_MIN_CHANGE = 1e-3
"""Smallest change of the outputs by pruning, in the same unit."""
Forward = Callable[[Any], torch.Tensor]


def build(name: str) -> tuple[Any, Forward]:
    """Return a tiny model, and a function that returns the logits of a model on fixed inputs."""
    if name in tiny_decoders.DECODERS:
        model, inputs = tiny_decoders.build(name), {"input_ids": tiny_decoders.some_ids(2, 12)}
    else:
        model, inputs = tiny_encoders.build(name), tiny_encoders.inputs(name)
    return model, _forward_on(inputs)


def build_pair(name: str) -> tuple[Any, Forward]:
    """Return the same for an encoder-decoder."""
    return tiny_encoder_decoders.build(name), _forward_on(tiny_encoder_decoders.inputs(name))


def _forward_on(inputs: Mapping[str, torch.Tensor]) -> Forward:
    def forward(model: Any) -> torch.Tensor:
        torch.manual_seed(0)
        with torch.no_grad():
            logits: torch.Tensor = model(**inputs).logits
        return logits

    return forward


def prune_heads(masked: Any, pruned: Any) -> None:
    """Set a different head or group of heads of each block to zero in ``masked``, and remove it from ``pruned``."""
    check_heads_prunable(masked)
    remaining_heads = []
    for index, block in enumerate(blocks(masked)):
        units = block.prunable_units
        remaining = [head for head in range(units) if units == 1 or head != index % units]
        remaining_heads.append(remaining)
        if remaining:
            output = block.require_attention().output
            _zero(output, [head for head in range(units) if head not in remaining], units)
    keep_heads(pruned, remaining_heads)


def prune_neurons(masked: Any, pruned: Any) -> None:
    """Set every other neuron of each block to zero in ``masked``, and remove it from ``pruned``."""
    remaining_neurons = [torch.arange(0, block.neurons, 2) for block in blocks(masked)]
    for block in blocks(masked):
        if block.neurons:
            _zero(block.require_feed_forward().output, list(range(1, block.neurons, 2)), block.neurons)
    keep_neurons(pruned, remaining_neurons)


def prune_layer(masked: Any, pruned: Any) -> None:
    """Skip the first removable layer in ``masked``, and remove it from ``pruned``."""
    layers = [layer for stack in stacks(masked).values() for layer in stack]
    for index, layer in enumerate(layers):
        try:
            keep_layers(pruned, [other for other in range(len(layers)) if other != index])
        except StageError:
            if index == len(layers) - 1:
                raise
        else:
            layer.register_forward_hook(_skip_layer, with_kwargs=True)
            return


PRUNED_PARTS: dict[str, Callable[[Any, Any], None]] = {
    "heads": prune_heads,
    "neurons": prune_neurons,
    "layers": prune_layer,
}


def trial(name: str, part: str, builder: Callable[[str], tuple[Any, Forward]] = build) -> str:
    """Prune a part of a model. Return an empty string if its outputs are correct, otherwise the reason."""
    model, forward = builder(name)
    masked, pruned, original_output = copy.deepcopy(model), copy.deepcopy(model), forward(model)
    try:
        PRUNED_PARTS[part](masked, pruned)
    except CompressError as error:
        return str(error).splitlines()[0]
    try:
        expected, output = forward(masked), forward(pruned)
    except (RuntimeError, ValueError, AssertionError) as error:  # the stage refuses these too
        return f"does not run any more: {first_line(error)}"
    unit = original_output.std()
    difference = float((output - expected).abs().max() / unit)
    reload_error = float((_reloaded_output(pruned, forward) - output).abs().max() / unit)
    change = float((expected - original_output).abs().max() / unit)
    correct = difference < _TOLERANCE and reload_error < _TOLERANCE and change > _MIN_CHANGE
    return "" if correct else f"difference {difference:.1e}, {reload_error:.1e} after loading, change {change:.1e}"


def _zero(layer: Linear, units: list[int], count: int) -> None:
    """Set the input columns of ``units``, out of ``count`` equal groups, to zero."""
    size = in_features(layer) // count
    columns = [unit * size + offset for unit in units for offset in range(size)]
    with torch.no_grad():
        if isinstance(layer, Conv1D):
            layer.weight[columns] = 0
        else:
            layer.weight[:, columns] = 0


def _skip_layer(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
    hidden = arguments[0] if arguments else named["hidden_states"]
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def _reloaded_output(model: Any, forward: Forward) -> torch.Tensor:
    class SameClass:
        """Auto class that creates models of the same class."""

        from_config: Any = staticmethod(type(model))

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return forward(load_pruned(SameClass, Path(folder), AutoConfig.from_pretrained(folder)).eval())


def _row(builder: Callable[[str], tuple[Any, Forward]], name: str, _: Path) -> dict[str, str]:
    reasons = {part: trial(name, part, builder) for part in PRUNED_PARTS}
    return {f"pruned {part}": f"no: {reason}" if reason else "yes" for part, reason in reasons.items()}


_COLUMNS = tuple(f"pruned {part}" for part in PRUNED_PARTS)
TRIAL, PAIR_TRIAL = (Trial(_COLUMNS, partial(_row, builder)) for builder in (build, build_pair))
