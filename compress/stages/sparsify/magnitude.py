"""Set the smallest weights to zero, at once or while training, and leave them there in later trainings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from compress.models.custom_module import CustomModule
from compress.models.model import TorchModel
from compress.numerics.pruning import cubic_sparsity, magnitude_masks
from compress.numerics.sparsity_pattern import Pattern
from compress.stages.base import Context
from compress.stages.sparsify.settings import GradualSparsity, Sparsity
from compress.stages.training.loop import Trainee, train
from compress.tasks.inference import loss_of
from compress.utils.errors import StageError

_UPDATES = 100
_FINAL_SPARSITY_AT = 0.7
"""Share of the steps after which sparsity stands still, so that the last steps recover quality."""


def sparsify(model: TorchModel, settings: Sparsity, context: Context) -> None:
    """Set the smallest weights of ``model``'s layers to zero in place, and report the density.

    With settings of a training, more and more weights become zero while it trains. Raises `StageError` for layers that
    the pattern does not fit.
    """
    pattern = None if settings.pattern is None else Pattern.read(settings.pattern)
    weights = [layer.weight for layer in _layers(model, pattern)]
    stage = "sparsify"
    if isinstance(settings, GradualSparsity):
        stage = "sparsify_gradually"
        _train(model, weights, pattern, settings, context)
    else:
        _zero(weights, magnitude_masks(weights, settings.zeros, pattern))
    zeros, count = sum(int((weight == 0).sum()) for weight in weights), sum(weight.numel() for weight in weights)
    shape = "" if settings.pattern is None else f" in the pattern {settings.pattern}"
    layers = f"{zeros / count:.2%} of the weights of {len(weights)} layers are zero{shape}"
    context.note(f"{stage}: {layers}, {zeros / model.parameters():.1%} of all parameters")


def _layers(model: TorchModel, pattern: Pattern | None) -> list[nn.Linear | nn.Conv2d]:
    """Return the layers to prune. Raises `StageError` without any, or if some do not hold the pattern."""
    layers = sparse_layers(model.module)
    if not layers:
        raise StageError(
            "The model has no layer whose weights can be pruned.",
            expected="linear layers, or convolutions beyond the first that aren't depthwise",
        )
    misfits = [name for name, layer in layers.items() if pattern and not pattern.fits(layer.weight.shape[1])]
    if misfits:
        others = f", and {len(misfits) - 1} layers more," if len(misfits) > 1 else ""
        inputs = layers[misfits[0]].weight.shape[1]
        raise StageError(
            f"{misfits[0]}{others} cannot hold the pattern {pattern}: it has {inputs} inputs.",
            hint="choose a pattern that divides them, or omit it",
        )
    return list(layers.values())


def _train(
    model: TorchModel, weights: list[torch.Tensor], pattern: Pattern | None, settings: GradualSparsity, context: Context
) -> None:
    masks = [torch.ones_like(weight, dtype=torch.bool) for weight in weights]

    def after_step(step: int, steps: int) -> None:
        rising = max(1, round(steps * _FINAL_SPARSITY_AT))
        every = max(1, rising // _UPDATES)
        if step == rising or (step < rising and step % every == 0):
            masks[:] = magnitude_masks(weights, cubic_sparsity(step, rising, settings.zeros), pattern)
        _zero(weights, masks)

    trainee = Trainee(
        model.module,
        context.encode("train", model),
        loss=lambda module, batch: loss_of(context.task, module, batch),
        after_step=after_step,
        validate=context.validator(model),
        freeze_embeddings=settings.freeze_embeddings,
        augment=settings.augment,
        # An earlier epoch is less sparse, so the last one is kept whatever the validation split says.
        keep_best=False,
    )
    train(trainee, settings, context.seed, context.progress, "sparsify_gradually")


@torch.no_grad()
def _zero(weights: Sequence[torch.Tensor], masks: list[torch.Tensor]) -> None:
    for weight, mask in zip(weights, masks, strict=True):
        weight.mul_(mask.to(weight.device))


_PRUNED_FROM = 0.05
"""A layer with at least this share of exact zeros is taken for pruned; dense training leaves none."""


def sparse_layers(module: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """Return the layers of the module's base model that may lose weights, by name, in order.

    The first convolution, which reads the input, and depthwise ones hold little and stay dense, and so do heads outside
    the base model; of a plain module the head is its last layer.
    """
    plain = isinstance(module, CustomModule)
    base: Any = module.network if plain else getattr(module, "base_model", module)
    layers_by_name: dict[str, nn.Linear | nn.Conv2d] = {}
    convolutions = 0
    for name, layer in base.named_modules():
        if isinstance(layer, nn.Conv2d):
            convolutions += 1
            if convolutions > 1 and layer.groups < layer.in_channels:
                layers_by_name[name] = layer
        elif isinstance(layer, nn.Linear):
            layers_by_name[name] = layer
    if plain and layers_by_name:
        layers_by_name.popitem()
    return layers_by_name


def keep_zeros(module: nn.Module) -> Callable[[int, int], None] | None:
    """Return a hook for after each step that resets pruned weights to zero, or None for a dense model."""
    masks = []
    for layer in sparse_layers(module).values():
        is_nonzero = layer.weight.detach() != 0
        if 1 - float(is_nonzero.float().mean()) >= _PRUNED_FROM:
            masks.append((layer, is_nonzero))
    if not masks:
        return None

    @torch.no_grad()
    def restore(step: int, steps: int) -> None:
        for layer, is_nonzero in masks:
            layer.weight.mul_(is_nonzero.to(layer.weight.device))

    return restore
