"""Cut heads, neurons and layers whose importance, measured on data, is least."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from compress.architectures.transformer import Block, blocks, keep_heads, keep_layers, keep_neurons, layer_list
from compress.checkpoints.torch_model import TorchModel
from compress.errors import StageError
from compress.numerics.pruning import most_important, taylor_importance
from compress.tasks.forward import forward, labels_or_answers, predict, tensors
from compress.tasks.task import Examples
from compress.training.channel_pruning import prune_channels
from compress.training.pruning_config import Pruning

if TYPE_CHECKING:
    from compress.stage.stage import Context

_BATCH = 32


def prune(model: TorchModel, settings: Pruning, context: Context) -> None:
    """Remove whole layers first, then heads, neurons and channels of the layers that are left, in place."""
    examples = _sample(settings, model, context)
    if settings.layers:
        assert examples is not None
        _remove_layers(model, settings.layers, examples, context)
    if settings.heads or settings.feed_forward:
        _cut_blocks(model, settings, examples, context)
    if settings.cuts_channels:
        assert examples is not None
        prune_channels(model, settings, examples, context)


def _cut_blocks(model: TorchModel, settings: Pruning, examples: Examples | None, context: Context) -> None:
    found = blocks(model.module)
    heads, neurons = _importance(model.module, found, settings, examples, context)
    if settings.heads:
        count = _kept(found[0].heads, settings.heads, "attention heads")
        keep_heads(model.module, [most_important(scores, count).tolist() for scores in heads])
    if settings.feed_forward:
        count = _kept(found[0].feed_forward_in.out_features, settings.feed_forward, "feed-forward neurons")
        keep_neurons(model.module, [most_important(scores, count) for scores in neurons])


def _sample(settings: Pruning, model: TorchModel, context: Context) -> Examples | None:
    if not settings.reads_examples:
        return None
    examples = context.encode("train", model)
    count = min(settings.importance_examples, len(examples))
    chosen = np.sort(np.random.default_rng(context.seed).permutation(len(examples))[:count])
    return examples.some(chosen)


def _kept(total: int, share_removed: float, what: str) -> int:
    count = round(total * (1 - share_removed))
    if count < 1:
        raise StageError(f"Removing {share_removed:.0%} of {total} {what} leaves none.", mend="remove a smaller share")
    return count


def _remove_layers(model: TorchModel, count: int, examples: Examples, context: Context) -> None:
    """Drop ``count`` layers, one at a time, each the one whose loss moves the logits least (KL)."""
    total = len(layer_list(model.module))
    if count >= total:
        raise StageError(f"Cannot remove {count} of {total} layers.", expected=f"at most {total - 1}")
    reference = torch.from_numpy(predict(model.module, examples))
    kept = list(range(total))
    for _ in context.progress.track(range(count), "prune: layers", count):
        damage = {}
        for candidate in kept:
            trial = copy.deepcopy(model.module)
            keep_layers(trial, [index for index in kept if index != candidate])
            damage[candidate] = float(context.task.distance(torch.from_numpy(predict(trial, examples)), reference, 1.0))
        kept.remove(min(damage, key=lambda index: (damage[index], index)))
    context.remark(f"prune: layers {kept} of {total} kept")
    keep_layers(model.module, kept)


def _importance(
    module: nn.Module, found: list[Block], settings: Pruning, examples: Examples | None, context: Context
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Scores of the heads [heads] and neurons [neurons] of each block."""
    if settings.importance == "magnitude":
        heads = [_squared_norms(block.attention_output, block.head_size) for block in found]
        return heads, [_squared_norms(block.feed_forward_out, 1) for block in found]
    assert examples is not None
    heads = [torch.zeros(block.heads) for block in found]
    neurons = [torch.zeros(block.feed_forward_in.out_features) for block in found]
    inputs: dict[nn.Module, torch.Tensor] = {}
    handles = [
        linear.register_forward_pre_hook(_keep_input(inputs))
        for block in found
        for linear in (block.attention_output, block.feed_forward_out)
    ]
    module.eval()
    order = np.argsort(examples.lengths(), kind="stable")
    starts = range(0, len(order), _BATCH)
    for start in context.progress.track(starts, "prune: importance", len(starts)):
        batch = tensors(examples, order[start : start + _BATCH].tolist())
        outputs = forward(module, batch)
        loss = context.task.loss(outputs, labels_or_answers(context.task, batch, outputs)) * len(batch["index"])
        layers = [linear for block in found for linear in (block.attention_output, block.feed_forward_out)]
        gradients = torch.autograd.grad(loss, [inputs[layer] for layer in layers])
        for index, block in enumerate(found):
            attention, feed_forward = inputs[layers[2 * index]], inputs[layers[2 * index + 1]]
            heads[index] += taylor_importance(attention.detach(), gradients[2 * index], block.head_size)
            neurons[index] += taylor_importance(feed_forward.detach(), gradients[2 * index + 1], 1)
    for handle in handles:
        handle.remove()
    return heads, neurons


def _keep_input(
    store: dict[nn.Module, torch.Tensor],
) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
    def hook(layer: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        store[layer] = arguments[0]

    return hook


def _squared_norms(output: nn.Linear, group_size: int) -> torch.Tensor:
    """Squared norms of the output weights of each group of input features, [in_features / group_size]."""
    return output.weight.detach().square().sum(dim=0).view(-1, group_size).sum(dim=1)
