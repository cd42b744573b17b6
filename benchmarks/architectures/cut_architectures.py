"""Models whose heads, neurons and layers can be cut.

A cut model has to answer as the whole one with zeros in place of what went, or with a layer passed over, and again
after it was saved and loaded.
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

_ALIKE = 1e-4
"""Of the standard deviation of the whole model's answers."""
_MOVED = 1e-3
Answer = Callable[[Any], torch.Tensor]


def build(name: str) -> tuple[Any, Answer]:
    """A tiny model, and what asks one like it."""
    if name in tiny_decoders.DECODERS:
        model, inputs = tiny_decoders.build(name), {"input_ids": tiny_decoders.some_ids(2, 12)}
    else:
        model, inputs = tiny_encoders.build(name), tiny_encoders.inputs(name)
    return model, _asking(inputs)


def build_pair(name: str) -> tuple[Any, Answer]:
    """As `build`, of an encoder with a decoder."""
    return tiny_encoder_decoders.build(name), _asking(tiny_encoder_decoders.inputs(name))


def _asking(inputs: Mapping[str, torch.Tensor]) -> Answer:
    def answer(asked: Any) -> torch.Tensor:
        torch.manual_seed(0)
        with torch.no_grad():
            logits: torch.Tensor = asked(**inputs).logits
        return logits

    return answer


def cut_heads(whole: Any, cut: Any) -> None:
    """Another head, or group of heads, of each block that has several: zeros in ``whole``, gone in ``cut``."""
    check_heads_prunable(whole)
    kept_heads = []
    for index, block in enumerate(blocks(whole)):
        units = block.prunable_units
        places = [position for position in range(units) if units == 1 or position != index % units]
        kept_heads.append(places)
        if places:
            output = block.require_attention().output
            _zero(output, [position for position in range(units) if position not in places], units)
    keep_heads(cut, kept_heads)


def cut_neurons(whole: Any, cut: Any) -> None:
    """Every other neuron of each block."""
    kept_neurons = [torch.arange(0, block.neurons, 2) for block in blocks(whole)]
    for block in blocks(whole):
        if block.neurons:
            _zero(block.require_feed_forward().output, list(range(1, block.neurons, 2)), block.neurons)
    keep_neurons(cut, kept_neurons)


def cut_layer(whole: Any, cut: Any) -> None:
    """The first layer that can go."""
    layers = [layer for stack in stacks(whole).values() for layer in stack]
    for index, layer in enumerate(layers):
        try:
            keep_layers(cut, [other for other in range(len(layers)) if other != index])
        except StageError:
            if index == len(layers) - 1:
                raise
        else:
            layer.register_forward_hook(_passed_over, with_kwargs=True)
            return


CUTS: dict[str, Callable[[Any, Any], None]] = {"heads": cut_heads, "neurons": cut_neurons, "layers": cut_layer}


def trial(name: str, what: str, made: Callable[[str], tuple[Any, Answer]] = build) -> str:
    """Nothing where a cut model is right, or what stands against it."""
    model, answer = made(name)
    whole, cut, answer_before = copy.deepcopy(model), copy.deepcopy(model), answer(model)
    try:
        CUTS[what](whole, cut)
    except CompressError as error:
        return str(error).splitlines()[0]
    try:
        expected, cut_answer = answer(whole), answer(cut)
    except (RuntimeError, ValueError, AssertionError) as error:  # which the stage refuses as well
        return f"does not run any more: {first_line(error)}"
    unit = answer_before.std()
    off, moved = float((cut_answer - expected).abs().max() / unit), float((expected - answer_before).abs().max() / unit)
    again = float((_loaded_again(cut, answer) - cut_answer).abs().max() / unit)
    right = off < _ALIKE and again < _ALIKE and moved > _MOVED
    return "" if right else f"{off:.1e} off, {again:.1e} when loaded again, moved by {moved:.1e}"


def _zero(layer: Linear, places: list[int], count: int) -> None:
    size = in_features(layer) // count
    columns = [position * size + offset for position in places for offset in range(size)]
    with torch.no_grad():
        if isinstance(layer, Conv1D):
            layer.weight[columns] = 0
        else:
            layer.weight[:, columns] = 0


def _passed_over(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
    hidden = arguments[0] if arguments else named["hidden_states"]
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def _loaded_again(model: Any, answer: Answer) -> torch.Tensor:
    class Same:
        """An Auto class that makes what the model is."""

        from_config: Any = staticmethod(type(model))

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return answer(load_pruned(Same, Path(folder), AutoConfig.from_pretrained(folder)).eval())


def _row(made: Callable[[str], tuple[Any, Answer]], name: str, _: Path) -> dict[str, str]:
    outcomes = {what: trial(name, what, made) for what in CUTS}
    return {f"pruned {what}": f"no: {reason}" if reason else "yes" for what, reason in outcomes.items()}


_COLUMNS = tuple(f"pruned {what}" for what in CUTS)
TRIAL, PAIR_TRIAL = (Trial(_COLUMNS, partial(_row, made)) for made in (build, build_pair))
