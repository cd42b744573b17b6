"""Cut heads, neurons and layers whose importance, measured on data, is least."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from compress.models.hooks import capture_inputs, removed_on_exit
from compress.models.model import TorchModel
from compress.models.structure import Linear, TransformerBlock, blocks, in_features, stacks
from compress.models.transformer_pruning import (
    check_heads_prunable,
    keep_heads,
    keep_layers,
    keep_neurons,
    remaining_count,
)
from compress.numerics.pruning import most_important, taylor_importance
from compress.stages.base import Context
from compress.stages.prune.channels import prune_channels
from compress.stages.prune.settings import Pruning
from compress.tasks.inference import loss_of, predict, tensors
from compress.tasks.task import Examples
from compress.tasks.tokens import by_length
from compress.utils.errors import StageError

_BATCH = 32
_PROVEN = 8
_ALIKE = 1e-3


def prune(model: TorchModel, settings: Pruning, context: Context) -> None:
    """Remove whole layers first, then heads, neurons and channels of the layers that are left, in place."""
    labeled = context.encode("train", model)
    order = np.random.default_rng(context.seed).permutation(len(labeled))
    examples = labeled.subset(np.sort(order[: settings.importance_examples]))
    if settings.layers:
        # Drop ``count`` layers, one at a time, each the one whose loss moves the logits least (KL).
        count = settings.layers
        total = sum(map(len, stacks(model.module).values()))
        if count >= total:
            raise StageError(f"Cannot remove {count} of {total} layers.", expected=f"at most {total - 1}")
        reference = torch.from_numpy(predict(model.module, examples))
        layer_indices = list(range(total))
        for _ in context.progress.track(range(count), "prune: layers", count):
            damage = {}
            for candidate in layer_indices:
                trial = copy.deepcopy(model.module)
                keep_layers(trial, [index for index in layer_indices if index != candidate])
                answers = torch.from_numpy(predict(trial, examples))
                damage[candidate] = float(context.task.distance(answers, reference, 1.0))
            layer_indices.remove(min(damage, key=lambda index: (damage[index], index)))
        context.note(f"prune: layers {layer_indices} of {total} kept")
        keep_layers(model.module, layer_indices)
    if settings.heads or settings.feed_forward:
        _cut_blocks(model, settings, examples, context)
    if settings.removes_channels:
        prune_channels(model, settings, examples, context)


def _cut_blocks(model: TorchModel, settings: Pruning, examples: Examples, context: Context) -> None:
    module = model.module
    if settings.heads:
        check_heads_prunable(module)
    found = blocks(module)
    scores = _importance(module, found, examples, context)
    heads, neurons = (
        [most_important(one, remaining_count(len(one), share, what)).tolist() for one in each]
        for each, share, what in (
            (scores[0], settings.heads, "attention heads"),
            (scores[1], settings.feed_forward, "feed-forward neurons"),
        )
    )
    expected, few = _masked(module, found, heads, neurons, examples)
    try:
        if settings.heads:
            keep_heads(module, heads)
        if settings.feed_forward:
            keep_neurons(module, [torch.tensor(kept) for kept in neurons])
        answers = predict(module, few)
    except RuntimeError as error:
        raise _not_described(module, str(error).splitlines()[0]) from error
    off = float(np.abs(answers - expected).max() / (np.abs(expected).max() or 1.0))
    if off > _ALIKE:
        raise _not_described(module, f"its answers are {off:.1e} from those with these parts as zeros")


def _not_described(module: Any, what: str) -> StageError:
    return StageError(
        f"Heads or neurons of a {module.config.model_type!r} model cannot be pruned: {what}.",
        expected="a pruned model whose outputs equal those with the removed parts set to zero",
        hint="leave heads and feed_forward out, and report the architecture",
    )


def _masked(
    module: Any,
    found: Sequence[TransformerBlock],
    heads: Sequence[list[int]],
    neurons: Sequence[list[int]],
    examples: Examples,
) -> tuple[np.ndarray, Examples]:
    """Return the unpruned model's answers to a few examples with zeros for removed parts, and these examples."""
    few = examples.subset(range(min(_PROVEN, len(examples))))
    parts = zip(_readers(found), (*heads, *neurons), strict=True)
    with removed_on_exit(
        layer.register_forward_pre_hook(_mask(torch.isin(torch.arange(count), torch.tensor(units)).float()))
        for (count, layer), units in parts
        if layer is not None
    ):
        return predict(module, few), few


def _readers(found: Sequence[TransformerBlock]) -> list[tuple[int, Linear | None]]:
    """Return the number of heads of each block and the layer that reads them, then the same of neurons."""
    heads = [(block.prunable_units, None if block.attention is None else block.attention.output) for block in found]
    neurons = [(block.neurons, None if block.feed_forward is None else block.feed_forward.output) for block in found]
    return [*heads, *neurons]


def _mask(stays: torch.Tensor) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], tuple[torch.Tensor, ...]]:
    def hook(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        inputs = arguments[0]
        return (inputs * stays.repeat_interleave(inputs.shape[-1] // len(stays)), *arguments[1:])

    return hook


def _importance(
    module: nn.Module, found: Sequence[TransformerBlock], examples: Examples, context: Context
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Scores of the heads [heads] and neurons [neurons] of each block, none where a block has none that can go."""
    parts = _readers(found)
    scores = [torch.zeros(count) for count, _ in parts]
    read = [(index, layer) for index, (_, layer) in enumerate(parts) if layer is not None]
    inputs: dict[int, torch.Tensor] = {}
    module.eval()
    batches = by_length(examples, _BATCH)
    for places in context.progress.track(batches, "prune: importance", len(batches)):
        batch = tensors(examples, places)
        with capture_inputs(dict(read), inputs.__setitem__):
            loss = loss_of(context.task, module, batch) * len(batch["index"])
        gradients = torch.autograd.grad(loss, [inputs[index] for index, _ in read])
        for (index, layer), gradient in zip(read, gradients, strict=True):
            size = in_features(layer) // len(scores[index])
            scores[index] += taylor_importance(inputs[index].detach(), gradient, size)
    return scores[: len(found)], scores[len(found) :]
